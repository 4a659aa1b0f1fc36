"""A bounded folder of fetched files that the processes of a node share, and that survives being killed at any moment.

    NAME.shard          complete: it is renamed to this once everything is written
    NAME.partial        being fetched by the holder of the lock, and of its full size from the start, so that concurrent
                        fetches count it; what a killed process leaves is fetched again
    NAME.lock, .lock    held by a process, and released the moment it is gone

The folder is this user's alone; files in it are created and opened without following links, and those of another user count
as missing (`cache_folder`).

Room is made by evicting the least recently opened files, before a fetch and once more after it, since concurrent fetches may
together exceed the limit. An evicted file stays readable for those who have it open, so the disk may hold a few files more
than the limit for a while.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.storage.cache_folder import create_own_file, make_cache_folder, open_own_file, opened
from tarflow.files import fsync_file, listed
from tarflow.leases import locked


class ShardCache:
    """Files of at most `limit` bytes in total in `folder`, which is created unless it exists."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = make_cache_folder(folder)
        self.limit = limit

    def open(
        self, name: str, size: int | None, fetch: Callable[[Any], None], right: Callable[[int], bool] = lambda _: True
    ) -> int:
        """A file descriptor of the cached file; `fetch(file)` writes it first where it is not there or has another size.

        `fetch` leaves the position of `file` at the end of what it wrote. `right`: judges a file that was there before,
        by its descriptor; a wrong one is fetched again.

        Several processes that want the same file fetch it once. Raises what `fetch` raises, DataError on a full disk, and
        where the folder is no longer this user's.
        """
        with opened(self.folder) as folder:
            fd = _open_whole(folder, f"{name}.shard", size)
            if fd is not None and right(fd):
                return fd
            _close(fd)
            with locked(self.folder / f"{name}.lock", wait=True):
                fd = _open_whole(folder, f"{name}.shard", size)  # another process may have been faster
                if fd is not None and not right(fd):
                    _close(fd)
                    fd = None
                if fd is None:
                    self.sweep()
                    fd = self._fetch(folder, name, size or 0, fetch)
            return fd

    def sweep(self) -> int:
        """Remove what killed processes left half-written; returns how many files. Leaves running fetches alone."""
        removed = 0
        for partial in listed(self.folder, "*.partial"):
            with locked(partial.with_suffix(".lock")) as mine:
                if mine:
                    partial.unlink(missing_ok=True)
                    removed += 1
        for lock in listed(self.folder, "*.lock"):
            if lock.name != ".lock":
                with locked(lock):  # leaving removes it
                    pass
        return removed

    def _fetch(self, folder: int, name: str, size: int, fetch: Callable[[Any], None]) -> int:
        """Write the file and rename it into place; returns a descriptor for reading.

        Opened before it is renamed: from then on another process that makes room may evict it at any moment.
        """
        partial = f"{name}.partial"
        try:
            with os.fdopen(create_own_file(folder, partial), "w+b") as file:
                with self._counting():
                    self._make_room(size)
                    # At its full size from the start, so that others who count see the room it is going to take.
                    file.truncate(size)
                fetch(file)
                file.truncate()
                file.flush()
                fsync_file(file.fileno(), self.folder / partial)
                fd = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.rename(partial, f"{name}.shard", src_dir_fd=folder, dst_dir_fd=folder)
            # What others fetched meanwhile was not there when room was made, so the limit is met once more.
            with self._counting():
                self._make_room(0)
            return fd
        except OSError as err:
            if err.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"no room for {name}.shard in {self.folder}: free the disk, lower data.cache_bytes "
                    f"({self.limit} bytes) or set data.cache_dir"
                ) from None
            raise DataError(
                f"cannot write {self.folder / partial}: {err.strerror or err} (setting data.cache_dir)"
            ) from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial, dir_fd=folder)

    def _counting(self) -> contextlib.AbstractContextManager[bool]:
        """Held while files are counted and evicted, so that only one process does so at a time."""
        return locked(self.folder / ".lock", wait=True)

    def _make_room(self, size: int) -> None:
        """Evict complete files until there is room for `size` more bytes, or none are left."""
        files = []
        held = size
        for path in listed(self.folder):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix in (".shard", ".partial"):
                    held += status.st_size
                if path.suffix == ".shard":
                    files.append((status.st_mtime_ns, status.st_size, path))
        for _, bytes_of_it, path in sorted(files):
            if held <= self.limit:
                return
            path.unlink(missing_ok=True)
            held -= bytes_of_it


def _open_whole(folder: int, name: str, size: int | None) -> int | None:
    fd = open_own_file(folder, name)
    if fd is None:
        return None
    if size is not None and os.fstat(fd).st_size != size:
        os.close(fd)
        return None
    with contextlib.suppress(OSError):
        os.utime(fd)  # marks it as used, so it is evicted later
    return fd


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
