"""What a job printed is shown, and not obeyed, and only what lies in the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tarflow.cluster.errors import ClusterError
from tarflow.records import append_record_line
from tarflow.trainer.run_dir import create_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "one"
    create_run(path)
    (path / "slurm" / "jobs").mkdir(parents=True)
    append_record_line(path / "slurm" / "jobs.jsonl", {"job": "107", "kind": "train", "logs": str(tmp_path / "secret")})
    return path


@pytest.mark.case("H11")
def test_escape_sequences_of_a_job_are_shown(run: Path, verb, capsys) -> None:
    log = run / "slurm" / "jobs" / "107_0_log.out"
    log.write_bytes(b"\x1b]0;title\x07\x1b[31mred\x1b[0m\tx\r\n 10%\r 20%\r\n\xff\xc2\x9b2J \xe2\x80\xae\n")
    assert verb("logs", run) == 0
    shown = "\\x1b]0;title\\x07\\x1b[31mred\\x1b[0m\tx\n 10%\n 20%\n\ufffd\\x9b2J \\u202e\n"
    assert capsys.readouterr().out == shown


@pytest.mark.case("H10")
def test_of_a_huge_log_the_end_is_shown_piece_by_piece(run: Path) -> None:
    log = run / "slurm" / "jobs" / "107_0_log.out"
    with open(log, "wb") as file:
        file.truncate(3 << 30)
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe end\n")
    words = [sys.executable, "-m", "tarflow", "logs", str(run)]
    program = "import resource, os, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30,) * 2); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    note = f"--- the last 16 MiB; {(3 << 30) + 9 - (16 << 20):,} bytes before them are in {log} ---\n".encode()
    assert process.stdout.read(len(note)) == note
    shown, end = 0, b""
    while piece := process.stdout.read(1 << 20):
        shown, end = shown + len(piece), (end + piece)[-16:]
    assert shown == 4 * ((16 << 20) - 9) + 9
    assert end.endswith(b"\\x00\nthe end\n")
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


@pytest.mark.case("H01")
def test_a_log_that_lies_elsewhere_is_not_shown(run: Path, verb, tmp_path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "107_0_log.out").write_text("secret\n")
    with pytest.raises(ClusterError, match="the job has not started"):
        verb("logs", run)
    (run / "slurm" / "jobs" / "107_0_log.out").symlink_to(tmp_path / "secret" / "107_0_log.out")
    with pytest.raises(ClusterError, match="no log of rank 0"):
        verb("logs", run)
    os.unlink(run / "slurm" / "jobs" / "107_0_log.out")
    os.mkfifo(run / "slurm" / "jobs" / "107_0_log.out")
    with pytest.raises(ClusterError, match="no log of rank 0"):
        verb("logs", run)


def test_logs_of_a_run_that_was_moved_are_found(run: Path, verb, tmp_path, capsys) -> None:
    (run / "slurm" / "jobs" / "107_0_log.out").write_text("so far\n")
    run.rename(tmp_path / "moved")
    assert verb("logs", tmp_path / "moved") == 0
    assert capsys.readouterr().out == "so far\n"


@pytest.mark.case("H05")
def test_a_damaged_list_of_jobs_is_named(run: Path, verb) -> None:
    (run / "slurm" / "jobs.jsonl").write_bytes(b'{"job": "107"\n')
    with pytest.raises(
        ClusterError, match=r"no submitted train job \(1 damaged line left out \(1\) in .*jobs\.jsonl\)"
    ):
        verb("logs", run)


@pytest.mark.case("H05")
def test_with_a_damaged_line_there_may_be_newer_jobs(run: Path, verb, capsys) -> None:
    (run / "slurm" / "jobs" / "107_0_log.out").write_text("so far\n")
    with open(run / "slurm" / "jobs.jsonl", "a") as file:
        file.write('{"job": "108", "kind": "tr')
    assert verb("logs", run) == 0
    out, err = capsys.readouterr()
    assert out == "so far\n"
    assert "jobs.jsonl: the last line has no end: there may be newer jobs than 107" in err
