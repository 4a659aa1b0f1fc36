"""Ranks on one machine: a lost process does not lose the allocation, exit codes and signals pass through."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tarflow.cli
import tarflow.trainer.resilience.supervisor
from tarflow.trainer.resilience.exit_codes import FAILED, FINISHED, HUNG, NO_PROGRESS, REQUEUE, USAGE
from tarflow.trainer.resilience.supervisor import Supervisor
from tarflow.trainer.run_dir import create_run
from tests.helpers.programs import program
from tests.helpers.waiting import PATIENCE_S, until
from tests.helpers.warm import warm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_run(tmp_path / "run")
    (tmp_path / "notes").mkdir()
    return tmp_path


def supervise(folder: Path, what: str, restarts: int, ranks: int = 2, grace_s: float = 0.5) -> int:
    """`grace_s`: PATIENCE_S where ranks must have time to heed a signal, also on a busy machine."""
    return supervisor(folder, what, restarts, ranks, grace_s).run()


def supervisor(folder: Path, what: str, restarts: int, ranks: int, grace_s: float = 0.5) -> Supervisor:
    command = [sys.executable, "-S", *program("scripted_rank", folder / "notes", what)[1:]]
    return Supervisor(command, ranks, folder / "run", restarts, grace_s)


def starts(folder: Path, rank: int) -> int:
    return len(list((folder / "notes").glob(f"began-{rank}-*")))


def log(folder: Path) -> list[str]:
    return (folder / "run" / "log.txt").read_text().splitlines() if (folder / "run" / "log.txt").exists() else []


@pytest.mark.case("C11")
def test_lost_process_is_named_its_peers_are_ended_and_all_start_again(folder: Path) -> None:
    assert supervise(folder, "lose-rank-1-once", restarts=1) == FINISHED
    assert (starts(folder, 0), starts(folder, 1)) == (2, 2)
    (line,) = log(folder)
    assert line.endswith(
        "rank 1 was killed by SIGKILL (often: out of memory) first; all ranks are gone; restart 1 of 1"
    )


@pytest.mark.parametrize(("code", "passed_on"), [(FAILED, FAILED), (HUNG, HUNG), (3, FAILED)])
def test_restarts_are_counted_and_the_last_failure_is_the_exit_code(folder: Path, code: int, passed_on: int) -> None:
    assert supervise(folder, f"exit-{code}", restarts=2) == passed_on
    assert starts(folder, 0) == 3
    assert "restart 2 of 2" in log(folder)[1]
    assert log(folder)[-1].endswith("no restarts are left (--max-restarts)")
    assert f"ended with exit code {code} first" in log(folder)[-1]


@pytest.mark.parametrize("code", [NO_PROGRESS, USAGE, REQUEUE])
def test_what_would_end_the_same_way_is_not_started_again(folder: Path, code: int) -> None:
    assert supervise(folder, f"exit-{code}", restarts=5) == code
    assert starts(folder, 0) == 1


def when(ready: Callable[[], bool], action: Callable[[], None]) -> None:
    """Do something from a thread, once it is time."""

    def wait() -> None:
        until("the time to act", ready)
        action()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize(("sent", "arrives"), [("SIGTERM", "SIGTERM"), ("SIGUSR2", "SIGUSR2"), ("SIGINT", "SIGTERM")])
@pytest.mark.case("C07")
def test_signal_to_the_launcher_reaches_every_rank_once(folder: Path, sent: str, arrives: str) -> None:
    ready = lambda: starts(folder, 0) + starts(folder, 1) == 2  # noqa: E731
    when(ready, lambda: os.kill(os.getpid(), signal.Signals[sent]))
    assert supervise(folder, "wait", restarts=5, grace_s=PATIENCE_S) == REQUEUE
    # A SIGINT from a keyboard reaches the ranks by itself; two of them would end them unsaved.
    assert [(folder / "notes" / f"signal-{rank}").read_text() for rank in (0, 1)] == [arrives] * 2
    assert starts(folder, 0) == 1


@pytest.mark.case("C07")
def test_signal_while_the_ranks_are_started_is_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def signalled(*arguments: Any, **settings: Any) -> "subprocess.Popen[bytes]":
        os.kill(os.getpid(), signal.SIGUSR1)  # before there is a process to hand it to
        return start(*arguments, **settings)

    monkeypatch.setattr(tarflow.trainer.resilience.supervisor.subprocess, "Popen", signalled)
    assert supervise(folder, "wait", restarts=5, grace_s=PATIENCE_S) == REQUEUE
    assert [(folder / "notes" / f"signal-{rank}").read_text() for rank in (0, 1)] == ["SIGTERM"] * 2


def test_second_interrupt_ends_ranks_that_do_not_listen(folder: Path) -> None:
    launcher = supervisor(folder, "deaf", restarts=5, ranks=1)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        until("the first one is heeded", lambda: launcher._interrupted)
        os.kill(os.getpid(), signal.SIGINT)

    when(lambda: (folder / "notes" / "deaf").exists(), twice)
    assert launcher.run() == FAILED
    assert starts(folder, 0) == 1


def launch(config: Path, run: Path, *more: str, **env: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tarflow", "train", str(config), "--run", str(run), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | env)  # fmt: skip


def members(group: int) -> list[int]:
    """Processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for_log(run: Path, text: str) -> None:
    log = run / "log.txt"
    until(f"{text!r} in the log", lambda: log.exists() and text in log.read_text())


@pytest.mark.case("C11")
def test_killed_rank_of_a_real_run_costs_a_restart_and_no_work(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher in this process, its ranks in forks that have loaded torch."""
    run = tmp_path / "run"
    monkeypatch.setattr(tarflow.trainer.resilience.supervisor, "module_command", warm)
    monkeypatch.setenv("TARFLOW_FAULT", "step@8/1=kill")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = ("train.max_images=160", "checkpoint.every_images=48", "checkpoint.asynchronous=false")
    words = ["train", str(tiny_config), "--run", str(run), *settings, "--ranks", "2", "--max-restarts", "1"]
    code = tarflow.cli.main(words)
    errors = capsys.readouterr().err
    assert code == FINISHED, errors[-2000:]
    said = (run / "log.txt").read_text()
    assert "supervisor: rank 1 was killed by SIGKILL (often: out of memory) first" in errors
    assert "rank 1 was killed by SIGKILL (often: out of memory) first; all ranks are gone; restart 1 of 1" in said
    assert "resuming at 96 images" in said
    assert "2 ranks x 1 micro-batch x 8 images" in said
    ranks = [json.loads(path.read_text())["pid"] for path in (run / "heartbeats").glob("rank-*.json")]
    assert len(ranks) == 2
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


@pytest.mark.case("C07")
def test_interrupt_of_the_whole_terminal_saves_once_and_leaves_nothing(tiny_config: Path, tmp_path: Path) -> None:
    """As a keyboard does it: the launcher, its ranks and their workers all get the signal at once."""
    run = tmp_path / "run"
    process = launch(
        tiny_config, run, "--ranks", "2", "data.num_workers=2", "train.max_images=16_000", "log.every_steps=1"
    )
    wait_for_log(run, "step 3 ")
    assert len(members(process.pid)) >= 7  # the launcher, two ranks, four workers
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == REQUEUE, errors[-2000:]
    assert (run / "log.txt").read_text().count("the same command resumes from here") == 1
    assert members(process.pid) == []


@pytest.mark.case("C07")
def test_ranks_of_a_killed_launcher_save_and_leave(tiny_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch(tiny_config, run, "--ranks", "1", "train.max_images=160_000", "log.every_steps=1")
    wait_for_log(run, "step 3 ")
    process.kill()
    process.communicate(timeout=300)
    wait_for_log(run, "stopped by SIGTERM")
    until("the end of all processes", lambda: members(process.pid) == [])


def test_ranks_share_the_cpus_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the whole machine, of which a job or a container may have a part."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    words = "import os, pathlib; pathlib.Path(os.environ['RANK']).write_text(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.chdir(tmp_path)
    create_run(tmp_path / "run")
    assert Supervisor([sys.executable, "-S", "-c", words], 2, tmp_path / "run", 0).run() == FINISHED
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3", "3"]
