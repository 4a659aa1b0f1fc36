"""Files in the folder of a node's cache, which is this user's own (`private_folder`), whoever else works on the node.

They are created, opened and removed by name through a descriptor of the folder. Links are not followed, and a file of
another user counts as missing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tarflow.data_pipeline.errors import DataError
from tarflow.errors import UserError
from tarflow.file_systems import check_owner, private_folder

_WAY_OUT = "name a folder of your own (setting data.cache_dir)"


def make_cache_folder(folder: Path) -> Path:
    """`private_folder` for the cache. Raises DataError."""
    try:
        return private_folder(folder, _WAY_OUT)
    except UserError as err:
        raise DataError(str(err)) from None


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """A descriptor of the folder, for names in it. Raises DataError where it is gone or belongs to somebody else."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as err:
        raise DataError(f"cannot open the cache folder {folder}: {err.strerror}; {_WAY_OUT}") from None
    try:
        try:
            check_owner(descriptor, folder, _WAY_OUT)
        except UserError as err:
            raise DataError(str(err)) from None
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
