"""A file system that lacks what others have: its calls, refused in this process with the error numbers of real ones."""

import errno
import fcntl
import os
import stat
from typing import Any

import pytest


def lack(patch: pytest.MonkeyPatch, **numbers: int) -> None:
    """Have calls answer with an error number: `flock`, `fsync_dir`, `fsync_file`, `link`, `utime`, `chmod`."""
    fsync = os.fsync

    def refused(number: int) -> Any:
        def call(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        return call

    def poor_fsync(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        number = numbers.get("fsync_dir" if folder else "fsync_file")
        if number is not None:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    patch.setattr(os, "fsync", poor_fsync)
    for module, name in ((fcntl, "flock"), (os, "link"), (os, "utime"), (os, "chmod")):
        if name in numbers:
            patch.setattr(module, name, refused(numbers[name]))


def lack_everything(patch: pytest.MonkeyPatch) -> None:
    """As poor as they come: Lustre without flock under a FUSE layer that keeps no links, times or modes."""
    lack(patch, flock=errno.ENOSYS, fsync_dir=errno.EINVAL, fsync_file=errno.EINVAL, link=errno.EPERM,
         utime=errno.EPERM, chmod=errno.EPERM)  # fmt: skip
