"""What a user can cause and mend; the front door says it without a traceback."""

import errno
import os
from pathlib import Path

from tarflow.file_systems import file_system


class UserError(ValueError):
    """Base of every room's error: the text says what was wrong, where, and which setting changes it."""


# Of the system's errors, those that the same command would meet again: a path is wrong, or not one's own.
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
    errno.ENAMETOOLONG: "the name is too long",
    errno.EMFILE: "too many open files (see `ulimit -n`)",
}
_FULL = {errno.ENOSPC: "no space is left on", errno.EDQUOT: "the quota is used up on", errno.EROFS: "read-only:"}


def in_words(error: OSError) -> str:
    """An error of the system as `PATH: what is wrong`, without its number."""
    path = os.fspath(error.filename2 or error.filename or "") if not isinstance(error.filename, int) else ""
    path = os.fsdecode(path)
    if error.errno in _FULL:
        words = f"{_FULL[error.errno]} its file system" + (f" ({file_system(path)})" if path else "")
    elif error.errno == errno.EEXIST and Path(path).is_file():
        words = "it is a file, where a folder is meant"
    else:
        words = _WORDS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
    return f"{path}: {words}" if path else words
