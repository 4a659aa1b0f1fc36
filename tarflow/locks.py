"""Locks between processes: `flock`, or leases on file systems without it.

Lustre mounted without `flock`, NFS without its lock service and some FUSE and cluster file systems refuse `flock`. That does
not mean that someone holds the lock: only EWOULDBLOCK does. A lease (`leases.py`) replaces it there, with a note once. A lock
ends with its process; a lease does so on the same machine, and elsewhere LEASE_S after its last renewal.
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
_LOOK_S = 0.2  # between polls of a lease that another process holds


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
