"""A job that finds its run in another's hands leaves it alone; a dead process's traces do not keep it."""

import fcntl
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job import writer
from tarflow.cluster.job.chain import Chain
from tarflow.cluster.job.record import Followed
from tarflow.cluster.job.writer import RunInUseError, other_writer, wait_for_writer
from tarflow.trainer.run_dir import create_run
from tests.cluster.fake_slurm import FakeSlurm
from tests.helpers.waiting import until
from tests.helpers.warm import warm


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(writer, "WATCH_S", 1.0)
    create_run(tmp_path / "run")
    (tmp_path / "run" / "heartbeats").mkdir()
    return tmp_path / "run"


def beat(run: Path, job: str, host: str = "node9", pid: int = 4711) -> None:
    facts = {"rank": 0, "world_size": 1, "host": host, "pid": pid, "job": job, "phase": "step", "time": time.time()}
    temporary = run / "heartbeats" / ".new"
    temporary.write_text(json.dumps(facts))
    temporary.rename(run / "heartbeats" / "rank-0000.json")


@contextmanager
def beating(run: Path, job: str) -> Iterator[None]:
    """A process of another node that lives."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(0.1):
            beat(run, job)

    beat(run, job)
    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def locked(run: Path, job: str) -> Iterator[None]:
    with open(run / ".lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(json.dumps({"host": "node9", "pid": 4711, "job": job}))
        file.flush()
        yield


def wait(run: Path, patience_s: float = 20.0) -> list[str]:
    said: list[str] = []
    wait_for_writer(run, "108", said.append, patience_s=patience_s)
    return said


@pytest.mark.parametrize("job", ["107", ""])
@pytest.mark.parametrize("lock", [True, False], ids=["locked", "a file system without locks between nodes"])
@pytest.mark.case("V12")
def test_a_living_writer_ends_the_wait_at_once(run: Path, job: str, lock: bool) -> None:
    named = r"host node9, pid 4711, Slurm job 107\)" if job else r"host node9, pid 4711\)"
    held = locked(run, job) if lock else nullcontext()
    with beating(run, job), held, pytest.raises(RunInUseError, match=named):
        wait(run)


@pytest.mark.case("V12")
def test_fresh_heartbeats_of_a_dead_process_cost_a_moment_only(run: Path) -> None:
    beat(run, "107")
    assert wait(run) == ["waiting for the process that still holds the run (host node9, pid 4711, Slurm job 107)"]


@pytest.mark.case("V12")
def test_heartbeats_of_this_very_job_and_old_ones_cost_nothing(run: Path) -> None:
    assert wait(run) == []
    beat(run, "108")
    assert wait(run) == [], "an earlier start, which has let go of the lock"
    beat(run, "107")
    os.utime(run / "heartbeats" / "rank-0000.json", (time.time() - 600, time.time() - 600))
    assert wait(run) == []
    beat(run, "", host=os.uname().nodename, pid=2**22 + 1)
    assert wait(run) == [], "killed on this machine"


@pytest.mark.case("V12")
def test_an_earlier_start_of_the_same_job_is_waited_for(run: Path) -> None:
    with locked(run, "108"), beating(run, "108"):
        with pytest.raises(ClusterError, match=r"still in use by an earlier start after 1 s .*job 108") as caught:
            wait(run, patience_s=1)
        assert not isinstance(caught.value, RunInUseError), "it is tried again on other nodes"
    assert wait(run) == []


@pytest.mark.case("V12")
def test_a_lock_whose_holder_shows_no_life_is_waited_for_and_then_left(run: Path) -> None:
    """The file server keeps the lock of a lost node for a while."""
    with locked(run, "107"), pytest.raises(RunInUseError, match="Slurm job 107"):
        wait(run, patience_s=0.5)


@pytest.mark.case("V12")
def test_only_a_living_holder_stands_in_the_way_of_a_requeue(run: Path) -> None:
    with locked(run, "107"):
        assert other_writer(run, "108") is None
        beat(run, "107")
        assert str(other_writer(run, "108")) == "host node9, pid 4711, Slurm job 107"
        assert other_writer(run, "107") is None
    assert other_writer(run, "108") is None


@pytest.fixture
def trained(verb, config_file, plain, tmp_path, fake, fake_slurm) -> Iterator[Path]:
    """A run with a submitted job, 107, that a real training holds as if it were job 99's."""
    run = tmp_path / "run"
    assert verb("submit", config_file, "--run", run, "--profile", plain) == 0
    words = warm("tarflow", "train", config_file, "--run-dir", run, "train.max_images=10_000_000")
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "TARFLOW_JOB": "99"}
    )
    until("a heartbeat", lambda: list((run / "heartbeats").glob("rank-0000.json")))
    yield run
    process.kill()
    process.wait()


@pytest.mark.case("V12")
def test_a_job_that_finds_a_living_writer_ends_without_a_requeue(trained: Path, fake, fake_slurm, verb) -> None:
    assert fake_slurm.run() == 80
    last = fake.said(trained).splitlines()[-1]
    assert f"run {trained} is being trained by another process (host {os.uname().nodename}, pid " in last
    assert "Slurm job 99)" in last
    assert fake_slurm.requeues() == []
    assert fake.chain(trained)["ended"]["code"] == 80
    from tarflow.cluster.status import rows

    (row,) = rows([trained])
    assert (row.state, row.jobs) == ("running", "107 stopped")


@pytest.mark.case("V12")
def test_a_training_by_hand_names_the_job_that_holds_the_run(trained: Path, config_file) -> None:
    from tarflow.trainer.errors import TrainerError
    from tarflow.trainer.run_dir import writer_lock

    named = r"in use by another process \(host .*, pid \d+, Slurm job 99\)"
    with pytest.raises(TrainerError, match=named), writer_lock(trained):
        pass


@pytest.mark.case("V12")
def test_the_evaluation_follows_the_run_through_all_its_jobs(run: Path) -> None:
    """Job 108 is queued behind 107; 109 found the run in use and left it to those before."""
    folder = run / "slurm"
    folder.mkdir()
    (folder / "jobs.jsonl").write_text(
        "".join(json.dumps({"job": j, "kind": "train"}) + "\n" for j in ("107", "108", "109"))
    )
    end = lambda job, code, text: Chain.load(folder, job).end(code, text)  # noqa: E731
    end("109", 80, "stopped: run is being trained by another process")
    assert Followed(folder, "109").ended_early() == "", "108 may go on"
    end("107", 78, "stopped: requeue limit")
    assert Followed(folder, "107").ended_early() == ""
    end("108", 78, "stopped: requeue limit")
    for job in ("107", "108", "109"):
        assert "has ended: stopped" in Followed(folder, job).ended_early()
    end("108", 0, "finished at step 200 after 0 restarts")
    assert Followed(folder, "109").ended_early() == ""
    Chain.load(folder, "108").end(0, "cancelled at step 100 after 0 restarts", cancelled=True)
    assert "training job 108 has ended" in Followed(folder, "108").ended_early(), "no failure, but nothing follows"


def test_the_evaluation_ends_behind_a_training_that_was_killed_before_it_could_note_it(
    run: Path, fake_slurm: FakeSlurm
) -> None:
    """Only if Slurm says twice that it has left the queue: no answer is none, and a requeue takes a moment."""
    folder = run / "slurm"
    folder.mkdir()
    (folder / "jobs.jsonl").write_text('{"job": "107", "kind": "train"}\n')
    Chain.load(folder, "107").begin(0, 0, "node1")
    answers = [
        "echo '107|RUNNING|None|node1|tarflow-x'",
        "exit 1",
        "exit 0",
        "echo '107|PENDING|||tarflow-x'",
        "exit 0",
    ]
    followed = Followed(folder, "107", look_every_s=0)
    for answer in answers:
        fake_slurm.command("squeue", answer)
        assert followed.ended_early() == "", answer
    assert followed.ended_early() == "training job 107 was ended before it could note it"
    seldom = Followed(folder, "107", look_every_s=1000)
    asked = len(fake_slurm.calls("squeue"))
    assert [seldom.ended_early() for _ in range(3)] == [""] * 3
    assert len(fake_slurm.calls("squeue")) == asked
