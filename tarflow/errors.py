"""User errors; the message says how to fix them, and the command line prints it without a traceback."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MOUNTS = Path("/proc/self/mounts")


class UserError(ValueError):
    """Base of every room's errors: the text says what was wrong, where, and which setting changes it."""


@contextmanager
def noted(flaws: list[str]) -> Iterator[None]:
    """For display: an unreadable or damaged file becomes an entry in `flaws`, and everything else is shown."""
    try:
        yield
    except (UserError, OSError) as error:
        text = in_words(error)
        if text not in flaws:
            flaws.append(text)


# System errors that the same command would meet again: a path is wrong, or belongs to someone else.
LASTING = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EXDEV, errno.ENXIO, errno.ENODEV,
}  # fmt: skip

_WORDS = {
    errno.ENOENT: "there is no such file or folder",
    errno.ENOTDIR: "a part of this path is a file, where a folder is meant",
    errno.EISDIR: "it is a folder, where a file is meant",
    errno.EEXIST: "it is there already",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not permit it",
    errno.EFBIG: "the file grew beyond what is allowed here (see `ulimit -f`)",
    errno.ELOOP: "it is a link: nothing is written through one (folders above it may be links), or it leads in a circle",
    errno.ENXIO: "it is a pipe or a device, where a file is meant",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EMFILE: "too many open files (see `ulimit -n`)",
}
_OF_THE_DISK = {
    errno.ENOSPC: "no space is left on its file system{}",
    errno.EDQUOT: "the quota is used up on its file system{}",
    errno.EROFS: "its file system{} is read-only",
}


def path_of(error: OSError) -> str:
    """The path of a system error; of two paths, the destination; empty without a path."""
    path = error.filename2 or error.filename
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""


def in_words(error: BaseException) -> str:
    """A system error as `PATH: what is wrong`, without its number; the message of any other error."""
    path = path_of(error) if isinstance(error, OSError) else ""
    return f"{path}: {why(error)}" if path else why(error)


def why(error: BaseException) -> str:
    """What is wrong, without the path: a system error in words, the message of any other error."""
    if not isinstance(error, OSError) or not error.errno:
        return str(error) or type(error).__name__
    path = path_of(error)
    if error.errno in _OF_THE_DISK:
        return _OF_THE_DISK[error.errno].format(f" ({file_system(path)})" if path else "")
    if error.errno == errno.EEXIST and path and Path(path).is_file():
        return "it is a file, where a folder is meant"
    return _WORDS.get(error.errno) or error.strerror or str(error)


def file_system(path: str | Path) -> str:
    """The file system that a path lies on, such as `nfs4 at /home`; the path itself if unknown."""
    here = os.path.realpath(path)
    best = ("", "")
    try:
        for line in _MOUNTS.read_text(errors="replace").splitlines():
            _, point, kind, *_ = line.split(" ")
            point = point.replace("\\040", " ")
            inside = point == "/" or here == point or here.startswith(point + "/")
            if inside and len(point) >= len(best[0]):  # of several mounts at one place the last one counts
                best = (point, kind)
    except (OSError, ValueError):
        pass
    return f"{best[1]} at {best[0]}" if best[0] else f"that of {here}"
