"""One living training job per run: a second submission is refused or waits, and what is not known is said."""

import json
import os
import time
from pathlib import Path

import pytest

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.chain import Chain
from tarflow.cluster.job.record import submissions
from tarflow.cluster.status import rows


@pytest.fixture
def submitted(fake_slurm, verb, config_file, tmp_path: Path) -> Path:
    """A run whose job 107 is running."""
    run = tmp_path / "run"
    assert verb("submit", config_file, "--run", run) == 0
    fake_slurm.command("squeue", 'echo "107|RUNNING|None|n1"')
    return run


@pytest.mark.case("V12")
def test_a_run_in_the_queue_is_refused_naming_the_job(submitted: Path, fake_slurm, verb, config_file) -> None:
    before = sorted(submitted.rglob("*"))
    with pytest.raises(ClusterError) as caught:
        verb("submit", config_file, "--run", submitted)
    said = str(caught.value)
    assert "train job 107 (RUNNING on n1, submitted " in said
    assert f"on {os.uname().nodename})" in said
    assert f"tarflow cancel {submitted}" in said
    assert "--after-running" in said
    assert len(fake_slurm.calls("sbatch")) == 1
    assert sorted(submitted.rglob("*")) == before, "nothing is made"


@pytest.mark.parametrize("state", ["PENDING", "COMPLETING", "REQUEUED", "SUSPENDED"])
@pytest.mark.case("V12")
def test_whatever_is_in_the_queue_lives(submitted: Path, fake_slurm, verb, config_file, state: str) -> None:
    fake_slurm.command("squeue", f'echo "107|{state}|None|"')
    with pytest.raises(ClusterError, match=rf"train job 107 \({state}, "):
        verb("submit", config_file, "--run", submitted)


@pytest.mark.case("V12")
def test_a_job_can_be_queued_behind_all_that_are_there(submitted: Path, fake_slurm, verb, config_file, capsys) -> None:
    assert verb("submit", config_file, "--run", submitted, "--after-running") == 0
    assert "#SBATCH --dependency=afterany:107\n" in fake_slurm.script.read_text()
    assert "it waits for job 107 to end" in capsys.readouterr().out
    fake_slurm.command("squeue", 'echo "107|RUNNING|None|n1"; echo "108|PENDING|Dependency|"')
    with pytest.raises(ClusterError, match=r"train job 107 \(RUNNING.*; train job 108 \(PENDING"):
        verb("submit", config_file, "--run", submitted)
    assert verb("submit", config_file, "--run", submitted, "--after-running") == 0
    assert "#SBATCH --dependency=afterany:107:108\n" in fake_slurm.script.read_text()
    (row,) = rows([submitted])
    assert (row.state, row.jobs) == ("starting", "107 RUNNING, 108 PENDING"), "the table knows all jobs of the run"


@pytest.mark.case("V12")
def test_what_has_left_the_queue_is_no_hindrance(submitted: Path, fake_slurm, verb, config_file, capsys) -> None:
    """Also where accounting is off and knows nothing. There is nothing to wait for, then."""
    fake_slurm.command("squeue", 'echo "999|RUNNING|None|n1"')
    assert verb("submit", config_file, "--run", submitted, "--after-running") == 0
    assert "dependency" not in fake_slurm.script.read_text()
    assert "waits" not in capsys.readouterr().out
    assert [entry["job"] for entry in submissions(submitted).entries] == ["107", "108"]


@pytest.mark.parametrize("more", [[], ["--after-running"]])
@pytest.mark.case("V12")
def test_a_queue_that_does_not_answer_is_said_and_not_guessed(
    submitted: Path, fake_slurm, verb, config_file, more
) -> None:
    fake_slurm.command("squeue", "exit 1")
    with pytest.raises(ClusterError, match=r"may be in use: train job 107 .*not known here: squeue does not answer"):
        verb("submit", config_file, "--run", submitted, *more)
    with pytest.raises(ClusterError, match=r"jobs\.jsonl"):
        verb("submit", config_file, "--run", submitted, *more)
    Chain.load(submitted / "slurm", "107").end(0, "finished at step 200 after 0 restarts")
    assert verb("submit", config_file, "--run", submitted) == 0, "its own record says that it is over"


@pytest.mark.case("V12")
def test_a_number_of_another_cluster_is_not_taken_for_a_job_of_this_one(
    submitted: Path, fake_slurm, verb, config_file, capsys
) -> None:
    """Two clusters that share a file system count their jobs apart."""
    path = submitted / "slurm" / "jobs.jsonl"
    line = json.loads(path.read_text())
    del line["checksum"]
    path.write_text(json.dumps(line | {"cluster": "east", "host": "login3"}) + "\n")
    fake_slurm.command("scontrol", 'echo "ClusterName = west"')
    fake_slurm.command("scancel")
    with pytest.raises(ClusterError, match=r"on login3; whether .*not known here: it belongs to the cluster east"):
        verb("submit", config_file, "--run", submitted)
    assert verb("cancel", submitted) == 1
    assert "not cancelled: train job 107" in capsys.readouterr().out
    assert fake_slurm.calls("scancel") == [], "107 of this cluster is somebody else's"
    assert rows([submitted])[0].jobs == "107 unknown"
    fake_slurm.command("scontrol", 'echo "ClusterName = east"')
    with pytest.raises(ClusterError, match="RUNNING on n1"):
        verb("submit", config_file, "--run", submitted)


@pytest.mark.case("V12")
def test_a_run_that_is_trained_by_hand_is_refused(fake_slurm, verb, config_file, tmp_path) -> None:
    """Nothing in the queue stands for such a process, so there is nothing to wait for either."""
    run = tmp_path / "run"
    assert verb("submit", config_file, "--run", run) == 0
    (run / "heartbeats").mkdir()
    facts = {"rank": 0, "world_size": 1, "host": "login2", "pid": 4711, "job": "", "phase": "step"}
    (run / "heartbeats" / "rank-0000.json").write_text(json.dumps(facts))
    for more in ([], ["--after-running"]):
        with pytest.raises(ClusterError, match=r"being trained by another process \(host login2, pid 4711\)"):
            verb("submit", config_file, "--run", run, *more)
    os.utime(run / "heartbeats" / "rank-0000.json", (time.time() - 600, time.time() - 600))
    assert verb("submit", config_file, "--run", run) == 0


@pytest.mark.case("H06")
def test_a_damaged_heartbeat_that_stands_for_a_process_is_named(fake_slurm, verb, config_file, tmp_path) -> None:
    run = tmp_path / "run"
    assert verb("submit", config_file, "--run", run) == 0
    (run / "heartbeats").mkdir()
    (run / "heartbeats" / "rank-0000.json").write_text("[")
    with pytest.raises(ClusterError, match=r"being trained by another process .*rank-0000\.json .*is damaged"):
        verb("submit", config_file, "--run", run)


@pytest.mark.case("V12")
def test_a_job_that_was_ended_a_moment_ago_is_no_hindrance(submitted: Path, fake_slurm, verb, config_file) -> None:
    """Its heartbeats are fresh still, but Slurm knows that it is over."""
    (submitted / "heartbeats").mkdir()
    facts = {"rank": 0, "world_size": 1, "host": "n1", "pid": 4711, "job": "107", "phase": "step"}
    (submitted / "heartbeats" / "rank-0000.json").write_text(json.dumps(facts))
    fake_slurm.command("squeue", "exit 0")
    assert verb("submit", config_file, "--run", submitted) == 0


@pytest.mark.case("V12")
def test_an_element_of_a_sweep_that_lives_stops_the_sweep(fake_slurm, verb, config_file, tmp_path) -> None:
    words = ["submit", config_file, "--run", tmp_path / "sweep", "--array", "seed=1,2"]
    assert verb(*words) == 0
    fake_slurm.command("squeue", 'echo "107_1|RUNNING|None|n1"')
    with pytest.raises(ClusterError, match=r"seed-2 is in the queue already: train job 107_1 \(RUNNING"):
        verb(*words)
    assert verb(*words, "--after-running") == 0
    assert "#SBATCH --dependency=afterany:107_1\n" in fake_slurm.script.read_text()


@pytest.mark.case("V12")
def test_a_second_evaluation_is_said(submitted: Path, fake_slurm, verb, capsys) -> None:
    """Any number may share the work, but that it happens is worth a line."""
    assert verb("submit-eval", submitted) == 0
    assert "note:" not in capsys.readouterr().out
    fake_slurm.command("squeue", 'echo "107|RUNNING|None|n1"; echo "108|PENDING|None|"; echo "109|PENDING|None|"')
    assert verb("submit-eval", submitted) == 0
    said = capsys.readouterr().out
    assert "note: evaluate job 108 (PENDING, submitted " in said
    assert "they share the work" in said
    assert "job 109 (" not in said
    assert rows([submitted])[0].jobs == "107 RUNNING, evaluation 108 PENDING, evaluation 109 PENDING"


@pytest.mark.case("V12")
def test_cancel_ends_all_jobs_of_a_run_those_that_wait_first(submitted: Path, fake_slurm, verb, config_file) -> None:
    assert verb("submit", config_file, "--run", submitted, "--after-running") == 0
    gone = fake_slurm.folder / "gone"
    fake_slurm.command(
        "squeue", f'[ -e "{gone}" ] || {{ echo "107|RUNNING|None|n1"; echo "108|PENDING|Dependency|"; }}'
    )
    fake_slurm.command("scancel", f'[ "$1" != --signal=USR2 ] || touch "{gone}"')
    assert verb("cancel", submitted) == 0
    assert fake_slurm.calls("scancel") == ["108", "--signal=USR2 107"]
    chain = Chain.load(submitted / "slurm", "108")
    assert chain.ended is not None
    assert (chain.ended["code"], chain.ended["text"]) == (0, "cancelled while it waited in the queue")
    assert chain.failed  # an evaluation that follows it must not wait for what will never come


@pytest.mark.case("V12")
def test_a_run_without_jobs_that_is_trained_by_hand_is_not_silently_left_alone(verb, config_file, tmp_path) -> None:
    from tarflow.trainer.run_dir import create_run

    create_run(tmp_path / "run")
    (tmp_path / "run" / "heartbeats").mkdir()
    facts = {"rank": 0, "world_size": 1, "host": "login2", "pid": 4711, "job": "", "phase": "step"}
    (tmp_path / "run" / "heartbeats" / "rank-0000.json").write_text(json.dumps(facts))
    with pytest.raises(ClusterError, match=r"no submitted jobs .*host login2, pid 4711\) ends after a save"):
        verb("cancel", tmp_path / "run")
