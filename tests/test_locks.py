"""Locks: only EWOULDBLOCK means held; a file system without locks gets leases, and is named once."""

import errno
import os
import re
import signal
import subprocess
import threading
import time

import pytest

from tarflow import errors, file_systems, leases
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.prepare.write import partial_folder
from tarflow.data_pipeline.storage.shard_cache import ShardCache
from tarflow.leases import holder, locked
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import writer_lock
from tests.helpers.poor_files import lack
from tests.helpers.programs import ENV, program

NO_FLOCK = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]
by_name = pytest.mark.parametrize("number", NO_FLOCK, ids=lambda n: errno.errorcode[n])


def refused(kind, match):
    return pytest.raises(kind, match=match)


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(file_systems, "_said", set())


@by_name
@pytest.mark.case("F01")
def test_a_run_is_written_by_one_process_without_flock(tmp_path, monkeypatch, capsys, number):
    lack(monkeypatch, flock=number)
    run = tmp_path / "run"
    with writer_lock(run):
        with (
            refused(TrainerError, rf"in use by another process \(host \S+, pid {os.getpid()}; free 60 s"),
            writer_lock(run),
        ):
            pass
        assert [p.name for p in run.iterdir() if p.name != ".lock"] == [".lock.0"]
    assert [p.name for p in run.iterdir()] == [".lock"]
    with writer_lock(run):
        pass
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1
    where = re.escape(f"{errors.file_system(tmp_path)}) has no locks ({errno.errorcode[number]}: ")
    assert re.search(rf"^note: the file system \({where}", notes[0])
    assert f"leases of 60 s stand in for them ({run}/.lock.*)" in notes[0]


@pytest.mark.case("F01")
def test_a_lock_that_is_held_is_held(tmp_path):
    who = rf"in use .*\(host \S+, pid {os.getpid()}\); two writers"
    with writer_lock(tmp_path), refused(TrainerError, who), writer_lock(tmp_path):
        pass


@by_name
@pytest.mark.case("F01")
def test_two_writers_of_one_data_set_without_flock(tmp_path, monkeypatch, number):
    lack(monkeypatch, flock=number)
    out = tmp_path / "out[1]"
    with partial_folder(out), refused(DataError, "another process is writing"), partial_folder(out):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out[1]"]


@by_name
@pytest.mark.case("F01")
def test_the_shard_cache_fetches_once_without_flock(tmp_path, monkeypatch, number):
    lack(monkeypatch, flock=number)
    monkeypatch.setattr(leases, "_LOOK_S", 0.01)
    fetched, began = [], threading.Barrier(4)

    def fetch(file):
        fetched.append(1)
        time.sleep(0.2)
        file.write(b"shard")

    def read():
        began.wait(10)
        descriptor = ShardCache(tmp_path / "cache", 100).open("a", 5, fetch)
        got.append(os.read(descriptor, 9))
        os.close(descriptor)

    got: list[bytes] = []
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert got == [b"shard"] * 4
    assert len(fetched) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["a.shard"]


@pytest.mark.case("F01")
def test_a_job_that_waits_for_the_last_writer_goes_on_without_flock(tmp_path, monkeypatch):
    from tarflow.cluster.job.writer import RunInUseError, wait_for_writer

    lack(monkeypatch, flock=errno.ENOLCK)
    said: list[str] = []
    wait_for_writer(tmp_path, "7", said.append)
    assert said == []
    with writer_lock(tmp_path), pytest.raises(RunInUseError, match=rf"being trained by .* pid {os.getpid()}"):
        wait_for_writer(tmp_path, "7", said.append, patience_s=0.1)
    assert len(said) == 1
    wait_for_writer(tmp_path, "7", said.append)
    assert len(said) == 1


def start_holder(run, lease_s=60.0):
    child = subprocess.Popen(
        program("hold_lease", run, lease_s), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


@pytest.mark.case("F01")
def test_a_writer_whose_lease_went_to_another_ends_at_once(tmp_path):
    """It was paused for longer than the lease: a save now would be a second writer's."""
    child = start_holder(tmp_path, lease_s=0.5)
    (tmp_path / ".lock.0").unlink()  # what one who takes over does
    _, err = child.communicate(timeout=20)
    assert child.returncode == 1
    assert err.splitlines()[-1].startswith(f"FAILED: {tmp_path}/.lock is gone or held by another process")


@pytest.mark.parametrize("here", ["poor", "rich"])
@pytest.mark.case("F01")
def test_a_lease_is_seen_and_ends_with_its_process(tmp_path, monkeypatch, here):
    """Also by a process whose machine can lock: mount options differ."""
    if here == "poor":
        lack(monkeypatch, flock=errno.ENOSYS)
    child = start_holder(tmp_path)
    with pytest.raises(TrainerError, match=f"pid {child.pid}; free 60 s"), writer_lock(tmp_path):
        pass
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with writer_lock(tmp_path):
        pass


def test_a_lock_file_that_its_holder_removes_is_made_anew(tmp_path):
    """Who waited for the removed file would hold what nobody else sees."""
    path, order = tmp_path / "lock", []

    def second():
        with locked(path, wait=True) as mine:
            order.append(("second", mine, path.exists()))

    with locked(path) as mine:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.05)
        order.append(("first", mine, path.exists()))
    thread.join(10)
    assert order == [("first", True, True), ("second", True, True)]
    assert not path.exists()


def test_who_holds_a_lock_may_not_have_said(tmp_path):
    assert holder(tmp_path / "none") == "it has not said which"


MOUNTS = """\
/dev/root / ext4 rw 0 0
tank /data zfs rw 0 0
10.0.0.1@tcp:/lfs /data/with\\040blank lustre rw,localflock 0 0
fuse /database fuse.sshfs rw 0 0
"""


def test_a_file_system_is_named_by_the_longest_mount_above(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(errors, "_MOUNTS", mounts)
    assert errors.file_system("/data/x") == "zfs at /data"
    assert errors.file_system("/data/with blank/run") == "lustre at /data/with blank"
    assert errors.file_system("/database") == "fuse.sshfs at /database"
    assert errors.file_system("/nowhere") == "ext4 at /"
    mounts.unlink()
    assert errors.file_system("/nowhere") == "that of /nowhere"
