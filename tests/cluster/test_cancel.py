"""Only jobs of the run are cancelled, on Slurm's own word; a file that names others is not obeyed."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tarflow.cluster.job.cancel_note import CancelNote
from tarflow.records import load_record

RUNNING = 'echo "107|RUNNING|None|n1|tarflow-run"'


@pytest.fixture
def submitted(fake_slurm, verb, config_file, tmp_path: Path) -> Path:
    """A run whose job 107 is running."""
    run = tmp_path / "run"
    assert verb("submit", config_file, "--run", run) == 0
    fake_slurm.command("scancel", f'touch "{fake_slurm.folder}/gone"')
    fake_slurm.command("squeue", f'[ -e "{fake_slurm.folder}/gone" ] || {RUNNING}')
    return run


@pytest.mark.case("H01")
def test_jobs_that_a_copied_file_names_are_left_alone(submitted: Path, fake_slurm, verb, tmp_path, capsys) -> None:
    for place in ("copy", "more/run", "run/inside"):
        shutil.copytree(submitted, tmp_path / place, ignore=shutil.ignore_patterns("inside"))
        assert verb("cancel", tmp_path / place) == 1
        said = capsys.readouterr().out
        assert "not cancelled: job 107, which" in said
        assert f"it is a job of another directory (its log is in {submitted / 'slurm' / 'jobs'})" in said
        assert not (tmp_path / place / "slurm" / "cancel-107").exists()
    assert fake_slurm.calls("scancel") == []
    link = tmp_path / "link"
    link.symlink_to(submitted)
    assert verb("cancel", link) == 0
    assert fake_slurm.calls("scancel") == ["--signal=USR2 107"]
    note = load_record(submitted / "slurm" / "cancel-107", CancelNote)
    assert note.job == "107"
    assert note.submission


@pytest.mark.parametrize(
    ("shown", "says"),
    [
        ("JobId=107 UserId=root(4711) StdOut={log}", r"it belongs to root\(4711\)"),
        ("JobId=107 StdOut={log}", "it belongs to nobody that Slurm knows"),
        ("JobId=107 UserId=me({uid}) StdOut=", "no place that Slurm names"),
        ("JobId=107 UserId=me({uid}) Comment=UserId=me({uid}) StdOut=/other/slurm/jobs/x", "another directory"),
        ("", "it belongs to nobody that Slurm knows"),
    ],
)
@pytest.mark.case("H01")
def test_what_slurm_does_not_call_this_runs_is_left_alone(
    submitted: Path, fake_slurm, verb, capsys, shown: str, says: str
) -> None:
    text = shown.format(uid=os.getuid(), log=submitted / "slurm" / "jobs" / "107_0_log.out")
    fake_slurm.command("scontrol", f"echo '{text}'")
    assert verb("cancel", submitted) == 1
    assert re.search(says, capsys.readouterr().out)
    assert fake_slurm.calls("scancel") == []


@pytest.mark.case("H05")
def test_jobs_of_sound_lines_are_cancelled_and_it_is_said_that_there_may_be_others(
    submitted: Path, fake_slurm, verb, capsys
) -> None:
    with open(submitted / "slurm" / "jobs.jsonl", "a") as file:
        file.write('{"job": "108", "kind": "tr')
    assert verb("cancel", submitted) == 1
    assert "the last line has no end: there may be jobs that it does not name" in capsys.readouterr().out
    assert fake_slurm.calls("scancel") == ["--signal=USR2 107"]


def test_a_number_that_something_else_has_now_is_over(submitted: Path, fake_slurm, verb, capsys) -> None:
    fake_slurm.command("squeue", 'echo "107|RUNNING|None|n1|somebody|elses job"')
    assert verb("cancel", submitted) == 0
    assert "no job of this run is in the queue" in capsys.readouterr().out


@pytest.mark.case("H05")
def test_a_job_that_waits_is_cancelled_and_its_damaged_record_named(submitted: Path, fake_slurm, verb, capsys) -> None:
    fake_slurm.command("squeue", 'echo "107|PENDING|None||tarflow-run"')
    chain = submitted / "slurm" / "chain-107.json"
    chain.write_bytes(b'{"starts": [')
    assert verb("cancel", submitted) == 0
    assert fake_slurm.calls("scancel") == ["107"]
    said = capsys.readouterr().out
    assert f"that job 107 is over is not noted: {chain} (record of the starts" in said
    assert chain.read_bytes() == b'{"starts": ['
