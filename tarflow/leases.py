"""Locks between processes: `flock`, or leases on file systems without it. Leases on a name are also used by themselves.

Lustre mounted without `flock`, NFS without its lock service and some FUSE and cluster file systems refuse `flock`. That does
not mean that someone holds the lock: only EWOULDBLOCK does. A lease replaces it there, with a note once. A lock ends with its
process; a lease does so on the same machine, and elsewhere LEASE_S after its last renewal.

    FOLDER/NAME.0 .1 ...   a lease on NAME; the highest number holds

A lease is a file created exclusively, with its holder inside, and renewed by touching it. A lease that was not renewed in
time, or whose process on this machine is dead, is void: the next number may be taken, again by one process only. Ages are
differences of times set by the file server, so the machines' clocks need not agree.
"""

import fcntl
import glob
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tarflow.file_systems import note_once
from tarflow.files import create_empty, discarded, fill, listed, open_own, write_new

HEARTBEATS = 5  # renewals within a lease
LEASE_S = 60.0  # that stands in for a lock
_LOOK_S = 0.2  # between polls of a lease that another process holds


def unique_name() -> str:
    """A name that no other process of any machine has, for temporary files."""
    return f"{os.uname().nodename}.{os.getpid()}.{uuid.uuid4().hex[:6]}"


@contextmanager
def leased(folder: Path, name: str, lease_s: float, lost: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold a name during the block, if it is free; yields whether it is held.

    `lost`: called in a thread if another process took the name over, because this one was paused for too long.
    """
    lease = _take(folder, name, lease_s)
    if lease is None:
        yield False
        return
    stop = threading.Event()
    beat = threading.Thread(target=_renew, args=(lease, lease_s, stop, lost), name="lease", daemon=True)
    beat.start()
    try:
        yield True
    finally:
        stop.set()
        beat.join()
        with suppress(OSError):  # one that cannot be removed expires
            lease.unlink()


def _number(path: Path) -> int:
    return int(path.name.rpartition(".")[2])


def _leases(folder: Path, name: str) -> list[Path]:
    """The leases on a name by number; only the last may hold."""
    found = listed(folder, f"{glob.escape(name)}.*")
    return sorted((p for p in found if p.stem == name and p.suffix[1:].isdecimal()), key=_number)


def held(folder: Path, name: str, lease_s: float) -> bool:
    """Whether a process holds a lease on the name."""
    found = _leases(folder, name)
    return bool(found) and _holds(found[-1], lease_s)


def _take(folder: Path, name: str, lease_s: float) -> Path | None:
    try:
        before = _leases(folder, name)
        if before and _holds(before[-1], lease_s):
            return None
        mine = _create(folder / f"{name}.{_number(before[-1]) + 1 if before else 0}")
    except (FileExistsError, FileNotFoundError):
        return None  # another process was faster, or the folder was removed
    if _leases(folder, name)[-1:] != [mine]:  # another process has taken a higher one and removed the void ones
        mine.unlink(missing_ok=True)
        return None
    for void in before:
        with suppress(OSError):
            void.unlink()
    return mine


def _create(path: Path) -> Path:
    """Create a lease together with its holder.

    If it were created empty and filled later, a kill in between would leave a lease without a process to check, which would
    hold until it expires.
    """
    holder = json.dumps({"host": os.uname().nodename, "pid": os.getpid()})
    temporary = path.with_name(f".{path.name}.{unique_name()}.tmp")
    with discarded(temporary):
        write_new(temporary, holder)
        try:
            os.link(temporary, path)
        except FileNotFoundError:
            raise
        except FileExistsError:
            if not path.samefile(temporary):  # the server's reply was lost and the link requested twice
                raise
        except OSError:  # a file system without hard links
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w") as file:
                file.write(holder)
    return path


def _holds(lease: Path, lease_s: float) -> bool:
    """Whether the holder of a lease may still be alive."""
    try:
        with open(
            open_own(lease, os.O_RDONLY)
        ) as file:  # opening makes a network file system ask the server for the time
            text, renewed = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return False
    if _now(lease.parent) - renewed > lease_s:
        return False
    try:
        holder = json.loads(text)
    except ValueError:
        return True  # just made, where there are no hard links
    if not isinstance(holder, dict):
        return True
    here = holder.get("host") == os.uname().nodename and Path("/proc/self").exists()
    return not here or Path(f"/proc/{holder.get('pid')}").exists()


def _now(folder: Path) -> float:
    """The file server's time."""
    clock = folder / f".clock.{unique_name()}"
    create_empty(clock)
    try:
        return clock.stat().st_mtime
    finally:
        clock.unlink(missing_ok=True)


def _renew(lease: Path, lease_s: float, stop: threading.Event, lost: Callable[[], None] | None) -> None:
    while not stop.wait(lease_s / HEARTBEATS):
        try:
            _touch(lease)
        except FileNotFoundError:  # a process that takes a name over removes the void leases
            if lost is not None and not stop.is_set():
                lost()
            return
        except OSError:
            continue  # the next beat may come through


def _touch(lease: Path) -> None:
    try:
        os.utime(lease)
    except FileNotFoundError:
        raise
    except OSError:  # a file system on which times cannot be set: writing sets them
        with open(open_own(lease, os.O_RDWR), "r+") as file:
            text = file.read()
            file.seek(0)
            file.write(text)


class NoLocksError(OSError):
    """The file system has no locks."""


@contextmanager
def locked(
    path: Path, *, wait: bool = False, lasting: bool = False, lost: Callable[[], None] | None = None
) -> Iterator[bool]:
    """Hold the lock file `path`; yields False if another process holds it, unless told to `wait`.

    The file is created, and removed afterwards unless it is `lasting`. `lost`: called in a thread if a lease went to another
    process because this one was paused for longer than LEASE_S. Raises OSError if the file cannot be created.
    """
    try:
        descriptor = _lock(path, wait)
    except NoLocksError as error:
        note_once(path.parent, "locks", error, f"leases of {LEASE_S:.0f} s stand in for them ({path}.*)")
        with _lease(path, wait, lost) as mine:
            yield mine
            if mine and not lasting:
                path.unlink(missing_ok=True)
        return
    if descriptor is None:
        yield False
        return
    try:
        # Another process may hold a lease instead: mount options differ between machines.
        while (taken := held(path.parent, path.name, LEASE_S)) and wait:
            time.sleep(_LOOK_S)
        yield not taken
    finally:
        if not lasting:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def sign(path: Path) -> None:
    """Write this process into a lock file, for `holder`."""
    with suppress(OSError):  # a full disk
        fill(path, f"host {os.uname().nodename}, pid {os.getpid()}")


def holder(path: Path, who: str = "") -> str:
    """The holder of a lock file, as text for a message; `who`: the holder if the caller knows it."""
    with suppress(OSError):
        who = who or path.read_text(errors="replace").strip()
    leases = held(path.parent, path.name, LEASE_S)
    return (who or "it has not said which") + (f"; free {LEASE_S:.0f} s after its last sign of life" if leases else "")


def _lock(path: Path, wait: bool) -> int | None:
    """A descriptor that holds the lock; None if another process does. Raises NoLocksError."""
    while True:
        descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_named(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise NoLocksError(error.errno, error.strerror) from None
        os.close(descriptor)  # the last holder removed the file meanwhile: this lock protects nothing


def _is_named(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def _lease(path: Path, wait: bool, lost: Callable[[], None] | None) -> Iterator[bool]:
    while True:
        with leased(path.parent, path.name, LEASE_S, lost) as mine:
            if mine or not wait:
                yield mine
                return
        time.sleep(_LOOK_S)
        path.parent.stat()  # raises if the folder is gone
