"""The folder of a node's cache: this user's own, whoever else works on the node.

What lies in it becomes training data, and files are made and removed in it by name. So it is made for its owner alone (mode
0700), and one that somebody else made first is refused. The way to it must not lead through a place where others could put
another folder under the same name: a folder that all may write, unless it is sticky as /tmp is and the entry one's own. A
group's folder passes: who may write there is for those who set it up to say.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tarflow.data_pipeline.errors import DataError

SETTING = "data.cache_dir"
_MOST_LINKS = 40


def make_own(folder: Path, setting: str = SETTING) -> Path:
    """Make the folder unless it is there; where it is, without links. Raises DataError where it is not this user's alone.

    `setting`: what names another one, for the message.
    """
    try:
        _check_way(folder, setting)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_way(folder, setting)
        real = folder.resolve(strict=True)
        with opened(real, setting) as descriptor:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:  # of an earlier version, or made by hand
                os.fchmod(descriptor, 0o700)
        return real
    except (OSError, RuntimeError) as err:
        why = err.strerror if isinstance(err, OSError) else str(err)
        raise DataError(f"cannot make the cache folder {folder}: {why} (setting {setting})") from None


@contextmanager
def opened(folder: Path, setting: str = SETTING) -> Iterator[int]:
    """A descriptor of the folder, for names in it. Raises DataError where it is gone or belongs to somebody else."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as err:
        raise DataError(f"cannot open the cache folder {folder}: {err.strerror} (setting {setting})") from None
    try:
        owner = os.fstat(descriptor).st_uid
        if owner != os.geteuid():
            raise DataError(
                f"the cache folder {folder} belongs to {_named(owner)}, who may put anything into it: {_way_out(setting)}"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def open_own_file(folder: int, name: str) -> int | None:
    """A descriptor to read a file by; None where there is none of this user's under that name, or a link."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        return descriptor
    os.close(descriptor)
    return None


def create_own_file(folder: int, name: str) -> int:
    """A descriptor of a new, empty file; whatever had the name is removed, not followed. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)


def write_own_file(folder: Path, name: str, data: bytes) -> None:
    """Replace a file in the cache folder in one step. Raises DataError, OSError."""
    partial = f"{name}.{os.getpid()}"
    with opened(folder) as descriptor:
        with os.fdopen(create_own_file(descriptor, partial), "wb") as file:
            file.write(data)
        os.rename(partial, name, src_dir_fd=descriptor, dst_dir_fd=descriptor)


def _way_out(setting: str) -> str:
    return f"name a folder of your own (setting {setting})"


def _check_way(folder: Path, setting: str) -> None:
    """Raise DataError where another user could put something else in the place of a part of this path."""
    for parent, entry in _steps(folder):
        about = parent.stat()
        if not about.st_mode & stat.S_IWOTH:
            continue
        if not about.st_mode & stat.S_ISVTX:
            raise DataError(
                f"the cache folder {folder} lies in {parent}, which everybody may write (mode {about.st_mode & 0o7777:o}): "
                f"{_way_out(setting)}"
            )
        if not os.path.lexists(entry):  # nobody can take the name from whoever makes it first
            continue
        owner = entry.lstat().st_uid
        if owner not in (0, os.geteuid()):
            what = "a link" if entry.is_symlink() else "a folder"
            raise DataError(f"the cache folder {folder}: {entry} is {what} of {_named(owner)}: {_way_out(setting)}")


def _steps(path: Path) -> Iterator[tuple[Path, Path]]:
    """(folder, entry in it) for every part of a path up to the first that is not there, and of the links on the way."""
    at, links = Path("/"), 0
    waiting = list(reversed(Path(os.path.abspath(path)).parts[1:]))
    while waiting:
        part = waiting.pop()
        if part == "..":
            at = at.parent
            continue
        entry = at / part
        yield at, entry
        if not os.path.lexists(entry):
            return
        if not entry.is_symlink():
            at = entry
            continue
        links += 1
        if links > _MOST_LINKS:
            raise RuntimeError("its links run in a circle")
        target = Path(os.readlink(entry))
        at = Path("/") if target.is_absolute() else at
        waiting += [part for part in reversed(target.parts) if part != "/"]


def _named(owner: int) -> str:
    try:
        return f"{pwd.getpwuid(owner).pw_name} (uid {owner})"
    except KeyError:
        return f"uid {owner}"
