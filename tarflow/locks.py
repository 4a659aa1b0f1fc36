"""Locks between processes: the system's own, and leases on a file system that has none.

Lustre mounted without `flock`, NFS without its lock service and some FUSE and cluster file systems refuse `flock`. That is
not a lock that someone holds: only EWOULDBLOCK says so. There a lease stands in (`leases.py`), which is said once. A lock
ends with its process; a lease does on the same machine, and elsewhere LEASE_S after the holder's last sign of life.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tarflow.file_systems import note_once
from tarflow.files import fill, open_own
from tarflow.leases import held, leased

LEASE_S = 60.0
_LOOK_S = 0.2  # between two looks at a lease that another holds


class NoLocksError(OSError):
    """The file system has no locks."""


@contextmanager
def locked(
    path: Path, *, wait: bool = False, lasting: bool = False, lost: Callable[[], None] | None = None
) -> Iterator[bool]:
    """Hold the lock file `path`, which is made; without `wait` False where another process holds it.

    The file is removed afterwards unless it is `lasting`. `lost`: called in a thread if a lease went to another process,
    because this one was paused for longer than LEASE_S. Raises OSError where the file cannot be made.
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
        # Another process may have had to take a lease: mount options differ from machine to machine.
        while (taken := held(path.parent, path.name, LEASE_S)) and wait:
            time.sleep(_LOOK_S)
        yield not taken
    finally:
        if not lasting:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def sign(path: Path) -> None:
    """Write into a lock file who holds it, for `holder`."""
    with suppress(OSError):  # a full disk
        fill(path, f"host {os.uname().nodename}, pid {os.getpid()}")


def holder(path: Path, who: str = "") -> str:
    """Who holds a lock file, in words for a message; `who`: as the caller has read it."""
    with suppress(OSError):
        who = who or path.read_text(errors="replace").strip()
    leases = held(path.parent, path.name, LEASE_S)
    return (who or "it has not said which") + (f"; free {LEASE_S:.0f} s after its last sign of life" if leases else "")


def _lock(path: Path, wait: bool) -> int | None:
    """A descriptor that holds the lock; None where another process does. Raises NoLocksError."""
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
        os.close(descriptor)  # its last holder has removed the file meanwhile: this lock guards nothing


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
        path.parent.stat()  # raises where the folder is gone
