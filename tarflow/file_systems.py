"""What a file system lacks, and folders on it that belong to one user alone.

A missing feature is recognized by its error number and noted once, with the name of the file system.

A private folder is for caches on nodes that others use, too. What lies in it becomes training data or runs as code, so it
is made for its owner alone (mode 0700), and one that somebody else made first, or could have written to, is refused. Nor may
its path lead through a place where others could put another
folder under the same name: a folder that everybody may write, unless it is sticky as /tmp is and the entry is one's own. A
group's folder is accepted on the way: who may write there is for those who set it up to decide.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tarflow.errors import UserError, file_system

# Errors of a call that is not provided, or not for this kind of file.
NOT_PROVIDED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_said: set[tuple[str, str]] = set()


def note_once(path: str | Path, lack: str, error: OSError, consequence: str) -> None:
    """Print a note that the file system of `path` lacks something; once for each file system and feature."""
    where = file_system(path)
    if (where, lack) in _said:
        return
    _said.add((where, lack))
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    with suppress(OSError):
        print(f"note: the file system ({where}) has no {lack} ({name}: {error.strerror}): {consequence}",
              file=sys.stderr, flush=True)  # fmt: skip


_MOST_LINKS = 40


def private_folder(folder: Path, way_out: str) -> Path:
    """The folder, with links above it resolved; created unless it exists, and closed to others.

    Raises UserError, with the way out, where it is a link or a file, or where another user could have put anything into it.
    """
    try:
        _check_path(folder, way_out)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        _check_path(folder, way_out)  # again: only now do all parts of it exist
        if folder.is_symlink() or not folder.is_dir():
            raise UserError(f"{folder} is a link or a file, where a folder of this user's own is expected; {way_out}")

        # From here on by a descriptor, which stays the same folder whatever happens to the name.
        real = folder.parent.resolve(strict=True) / folder.name
        descriptor = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _close_to_others(descriptor, folder, way_out)
        finally:
            os.close(descriptor)
        return real
    except (OSError, RuntimeError) as err:
        why = err.strerror if isinstance(err, OSError) else str(err)
        raise UserError(f"cannot make the folder {folder}: {why}; {way_out}") from None


def check_owner(descriptor: int, folder: Path, way_out: str) -> None:
    """Raise UserError unless the open folder belongs to this user."""
    owner = os.fstat(descriptor).st_uid
    if owner != os.geteuid():
        raise UserError(f"{folder} belongs to another user ({_user(owner)}), who may put anything into it; {way_out}")


def _close_to_others(descriptor: int, folder: Path, way_out: str) -> None:
    check_owner(descriptor, folder, way_out)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if mode & 0o022:
        raise UserError(
            f"{folder} can be written by others (mode {mode:o}), who may have put anything into it; {way_out}"
        )
    if mode & 0o055:  # made by an earlier version, or by hand
        os.fchmod(descriptor, 0o700)


def _check_path(folder: Path, way_out: str) -> None:
    """Raise UserError where another user could replace a part of this path."""
    for parent, entry in _steps(folder):
        about = parent.stat()
        if not about.st_mode & stat.S_IWOTH:
            continue
        if not about.st_mode & stat.S_ISVTX:
            raise UserError(
                f"{folder} lies in {parent}, which everybody may write (mode {about.st_mode & 0o7777:o}); {way_out}"
            )
        if not os.path.lexists(entry):  # nobody can take the name from whoever creates it first
            continue
        owner = entry.lstat().st_uid
        if owner not in (0, os.geteuid()):
            what = "a link" if entry.is_symlink() else "a folder"
            raise UserError(f"{folder}: {entry} is {what} of another user ({_user(owner)}); {way_out}")


def _steps(path: Path) -> Iterator[tuple[Path, Path]]:
    """(folder, entry in it) for every part of a path up to the first that does not exist, and of the links on the way."""
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
            raise RuntimeError("its links form a circle")
        target = Path(os.readlink(entry))
        at = Path("/") if target.is_absolute() else at
        waiting += [part for part in reversed(target.parts) if part != "/"]


def _user(number: int) -> str:
    try:
        return f"{pwd.getpwuid(number).pw_name}, uid {number}"
    except KeyError:
        return f"uid {number}"
