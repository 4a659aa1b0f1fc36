"""Files and folders of one's own: what is made or written is never reached through a link at its name.

Whoever can put a name into a folder (a stranger who made a run directory, a colleague who may write into it) could turn a
write into one to any file that the user may write. Folders on the way may be links (a run directory that lies on
scratch, say); the last name may not. Reading follows links.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from tarflow.errors import UserError


def open_own(path: Path, flags: int, mode: int = 0o666) -> int:
    """A descriptor of a regular file, made if `flags` say so.

    Raises OSError as os.open does: ELOOP where a link has the name, ENXIO for a pipe, a device, a folder. Never waits.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), str(path))
    return descriptor


def create(path: Path, mode: int = 0o666) -> int:
    """A descriptor of a new, empty file, open for writing. What has the name, a file or a link that a kill left or someone
    planted, is removed first."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags, mode)
    except FileExistsError:
        os.unlink(path)
        return os.open(path, flags, mode)


def create_empty(path: Path) -> None:
    """A new, empty file for a library that opens what it writes by name; as `create`."""
    os.close(create(path))


def fill(path: Path, text: str) -> None:
    """Replace the text of a file in place, of a lock that is held, say: its name stays with the same file."""
    descriptor = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def write_new(path: Path, data: str | bytes) -> None:
    """A new file with this text or these bytes; as `create`."""
    with open(create(path), "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def refuse_link(path: Path) -> None:
    """Raise OSError ELOOP where a link has the name."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def make_folder(root: Path, *below: str) -> Path:
    """Make a folder, and those `below` it, one in the other, unless they are there; the last one.

    `root` is what a user has named, and may be a link. Raises OSError ELOOP for a link in the place of one below it.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name in below:
        root = root / name
        refuse_link(root)
        root.mkdir(exist_ok=True)
        refuse_link(root)
    return root


def private_folder(path: Path, way_out: str) -> Path:
    """A folder that nobody else can read or write, made so or found so: for a cache on a node that others use.

    Raises UserError, with the way out, where something else has the name: what lies in it may not be one's own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    about = os.lstat(path)
    if not stat.S_ISDIR(about.st_mode):
        raise UserError(f"{path} is a link or a file, where a folder of this user's own is meant; {way_out}")
    if about.st_uid != os.geteuid():
        raise UserError(f"{path} belongs to another user (uid {about.st_uid}), who may put anything into it; {way_out}")
    if about.st_mode & 0o022:
        raise UserError(
            f"{path} can be written by others (mode {about.st_mode & 0o777:o}), who may have put anything into it; {way_out}"
        )
    if about.st_mode & 0o055:
        path.chmod(0o700)
    return path
