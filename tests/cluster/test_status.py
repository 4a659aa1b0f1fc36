"""The table of runs, `logs` and `cancel`, with what Slurm says replaced by scripts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.chain import Chain, Limits, Outcome, decide, exhausted, fruitless
from tarflow.cluster.slurm import JobState, states
from tarflow.cluster.status import find_runs, job_state, rows
from tarflow.trainer.run_dir import create_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one training job, 107, that has been restarted twice."""
    path = tmp_path / "runs" / "one"
    create_run(path)
    (path / "slurm" / "jobs").mkdir(parents=True)
    (path / "heartbeats").mkdir()
    entry = {"job": "107", "kind": "train", "logs": str(path / "slurm" / "jobs"), "ranks_per_task": 2}
    (path / "slurm" / "jobs.jsonl").write_text(json.dumps(entry) + "\n")
    chain = Chain.load(path / "slurm", "107")
    for restart, step in ((0, 0), (1, 40), (2, 80)):
        chain.begin(restart, step, "n1")
    return path


def test_a_job_in_the_queue_is_alive_whatever_accounting_says(fake_slurm) -> None:
    """Accounting shows NODE_FAIL for seconds while the job is on its way back; submitit's watcher takes it for the end."""
    fake_slurm.command(
        "squeue", 'echo "107|PENDING|BeginTime|"; echo "9|RUNNING|None|n1"; echo "8_2|COMPLETED|None|n1"'
    )
    fake_slurm.command("sacct", 'echo "107|NODE_FAIL|1:0|n1"; echo "8_2|COMPLETED|0:0|n1"')
    found = states(["107", "8_2"])
    assert found["107"] == JobState("PENDING", "BeginTime", "", live=True)
    assert found["8_2"] == JobState("COMPLETED", "exit 0", "n1")
    (asked,) = fake_slurm.calls("sacct")
    assert asked.endswith("-j 8_2")


def test_a_lost_node_is_not_the_end_before_the_chain_says_so(run: Path, fake_slurm) -> None:
    fake_slurm.command("squeue", "exit 0")
    fake_slurm.command("sacct", 'echo "107|NODE_FAIL|1:0|n1"')
    (row,) = rows([run])
    assert row.state == "NODE_FAIL (will requeue)"
    Chain.load(run / "slurm", "107").end(78, "stopped: requeue limit: 100 restarts")
    (row,) = rows([run])
    assert row.state == "NODE_FAIL (stopped, exit 78)"


@pytest.mark.parametrize("script", ["exec sleep 600", "exit 1"])
def test_a_slurm_that_does_not_answer_leaves_the_table_with_what_the_files_say(
    run: Path, fake_slurm, script, monkeypatch
) -> None:
    from tarflow.cluster import slurm

    ask = slurm.ask
    monkeypatch.setattr(slurm, "ask", lambda command, timeout_s=0.5: ask(command, 0.5))
    for name in ("squeue", "sacct"):
        fake_slurm.command(name, script)
    (row,) = rows([run])
    assert (row.job, row.state, row.restarts) == ("107", "unknown", "2")


@pytest.mark.parametrize(
    ("state", "ended", "expected"),
    [
        (JobState("PENDING", "BeginTime", live=True), None, "PENDING (will go on) BeginTime"),
        (JobState("RUNNING", live=True), None, "RUNNING"),
        (JobState("PREEMPTED", "exit 0"), None, "PREEMPTED (will requeue)"),
        (JobState("FAILED", "exit 76"), (76, "stopped: no progress at step 3: x"), "FAILED (stopped, exit 76)"),
        (JobState("COMPLETED", "exit 0"), (0, "finished at step 9 after 1 restart"), "COMPLETED (finished)"),
        (JobState("FAILED", "exit 1"), None, "FAILED (exit 1)"),
        (None, (0, "cancelled at step 4 after 0 restarts"), "cancelled"),
    ],
)
def test_states_in_words(run: Path, state, ended, expected) -> None:
    chain = Chain.load(run / "slurm", "107")
    if ended:
        chain.end(*ended)
    assert job_state("107", state, chain) == expected


def test_a_row_says_how_far_a_run_is(run: Path, fake_slurm, config_file) -> None:
    fake_slurm.command("squeue", 'echo "107|RUNNING|None|n1"')
    (run / "config.yaml").write_text(config_file.read_text())
    now = time.time()
    figures = {"step": 100, "images_seen": 1600, "time": now, "throughput/images_per_sec": 20.0}
    (run / "metrics.jsonl").write_text(json.dumps(figures) + '\n{"step": 101, "ha')
    (run / "heartbeats" / "rank-0000.json").write_text("{}")
    (run / "heartbeats" / "rank-0001.json").write_text("{}")
    os.utime(run / "heartbeats" / "rank-0001.json", (now - 65, now - 65))
    (run / "evals.jsonl").write_text(json.dumps({"step": 50, "metrics": {"eval/fd_inception": 12.345}}) + "\n")
    (row,) = rows([run], now)
    assert (row.state, row.step, row.images, row.rate) == ("RUNNING", "100", "1,600 / 3,200", "20")
    assert row.eta == "1:20 min"
    assert row.heartbeat == "1:05 min ago", "of the rank that has been silent for longest"
    assert (row.restarts, row.score) == ("2", "fd_inception 12.35 @ 50")


def test_runs_are_found_in_folders_and_sweeps(run: Path, tmp_path: Path) -> None:
    create_run(tmp_path / "runs" / "sweep" / "seed-1")
    assert find_runs([tmp_path / "runs"]) == [run, tmp_path / "runs" / "sweep" / "seed-1"]
    with pytest.raises(ClusterError, match="no run directory"):
        find_runs([tmp_path / "nothing"])


def test_watch_looks_again_until_it_is_interrupted(run: Path, fake_slurm) -> None:
    fake_slurm.command("squeue", 'echo "107|RUNNING|None|n1"')
    words = [sys.executable, "-m", "tarflow", "status", str(run), "--watch", "--every", "0.2"]
    # A shell lets what it starts in the background ignore interrupts, this suite perhaps, and its children with it.
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    end = time.monotonic() + 40
    while len(fake_slurm.calls("squeue")) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, wrong = process.communicate(timeout=20)
    assert process.returncode == 0, wrong
    assert "RUNNING" in said


def test_logs_of_a_rank_are_those_of_its_task(run: Path, verb, capsys) -> None:
    jobs = run / "slurm" / "jobs"
    (jobs / "107_0_log.out").write_text("zero\n")
    (jobs / "107_1_log.out").write_text("one\n")
    (jobs / "107_1_log.err").write_text("wrong\n")
    for rank, text in ((0, "zero\n"), (1, "zero\n"), (3, "one\n--- 107_1_log.err ---\nwrong\n")):
        assert verb("logs", run, "--rank", rank) == 0
        assert capsys.readouterr().out == text
    with pytest.raises(ClusterError, match=r"job 107 has no log of rank 9 .*there are ranks 0 to 3"):
        verb("logs", run, "--rank", 9)
    with pytest.raises(ClusterError, match="no submitted evaluate job"):
        verb("logs", run, "--evaluation")


def test_cancel_has_the_training_save_and_ends_what_waits(run: Path, verb, fake_slurm, capsys) -> None:
    with open(run / "slurm" / "jobs.jsonl", "a") as file:
        file.write(json.dumps({"job": "108", "kind": "evaluate", "logs": "x"}) + "\n")
    gone = fake_slurm.folder / "gone"
    fake_slurm.command("squeue", f'[ -e "{gone}" ] || {{ echo "107|RUNNING|None|n1"; echo "108|PENDING|None|"; }}')
    fake_slurm.command("sacct", "exit 0")
    fake_slurm.command("scancel", f'[ "$1" != --signal=USR2 ] || touch "{gone}"')
    assert verb("cancel", run) == 0
    assert fake_slurm.calls("scancel") == ["--signal=USR2 107", "108"]
    assert "job 107 saved and ended" in capsys.readouterr().out
    assert (run / "slurm" / "cancel-107").exists()


def test_cancel_of_a_job_that_does_not_save_ends_it_and_says_so(run: Path, verb, fake_slurm, capsys) -> None:
    fake_slurm.command("squeue", 'echo "107|RUNNING|None|n1"')
    fake_slurm.command("scancel")
    assert verb("cancel", run, "--wait", "0.3") == 1
    assert fake_slurm.calls("scancel") == ["--signal=USR2 107", "107"]
    assert "the last checkpoint stands" in capsys.readouterr().out


def chain_of(tmp_path: Path, *steps: int) -> Chain:
    return Chain(tmp_path / "c.json", [{"restart": i, "step": step} for i, step in enumerate(steps)])


@pytest.mark.parametrize(
    ("code", "steps", "now", "requeue", "ends"),
    [
        (0, [0], 9, False, 0),
        (76, [0], 0, False, 76),
        (77, [0], 0, True, 75),
        (1, [0, 0, 0], 0, True, 75),
        (1, [0, 0, 0, 0], 0, False, 76),
        (77, [0, 0, 0, 0], 5, True, 75),
        (75, [0, 5, 9, 12, 17, 20], 22, False, 78),
        (0, [0, 5, 9, 12, 17, 20], 22, False, 0),
    ],
)
def test_the_rule(tmp_path: Path, code, steps, now, requeue, ends) -> None:
    decision = decide(Outcome(code), chain_of(tmp_path, *steps), now, Limits(max_restarts=5, max_no_progress=3))
    assert (decision.requeue, decision.code) == (requeue, ends)
    assert decision.text


def test_killed_starts_use_up_the_limits_too(tmp_path: Path) -> None:
    limits = Limits(max_restarts=5, max_no_progress=3)
    assert fruitless([{"step": 0}, {"step": 4}, {"step": 4}], 4) == 1
    assert exhausted(chain_of(tmp_path), limits) is None
    assert exhausted(chain_of(tmp_path, 0, 0, 0, 0), limits) is None
    for steps, code in (([0] * 5, 76), ([0, 1, 2, 3, 4, 5, 6], 78)):
        ended = exhausted(chain_of(tmp_path, *steps), limits)
        assert ended is not None
        assert ended.code == code
