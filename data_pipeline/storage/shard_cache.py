"""A bounded folder of fetched files that the processes of a node share, and that survives being killed at any moment.

    NAME.shard          whole: it got its name only when everything was written
    NAME.partial        being fetched by whoever holds the lock, and as large from the start as it will be, so that others who
                        fetch at the same time count it; left over by a killed process, it is fetched again
    NAME.lock, .lock    held by a process, and free the moment it is gone

The folder is this user's alone (`cache_folder`); in it, files are made and opened without following links, and those of
somebody else are not there.

Room is made by removing what was opened longest ago, before a fetch and once more after it: fetches at the same time may
be larger than the bound together. A removed file stays readable for those who have it open. So the disk may hold a few
files more than the bound for a while.
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
from tarflow.locks import locked


class ShardCache:
    """Files of at most `limit` bytes together in `folder`, which is made when it is first needed."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = make_cache_folder(folder)
        self.limit = limit

    def open(
        self, name: str, size: int | None, fetch: Callable[[Any], None], right: Callable[[int], bool] = lambda _: True
    ) -> int:
        """A file descriptor of the cached file; `fetch(file)` writes it first where it is not there or has another size.

        `fetch` leaves the position of `file` at the end of what it wrote. `right`: looks at a file that was there before,
        by its descriptor; where it says no, the file is fetched anew.

        Several processes that want the same file fetch it once. Raises what `fetch` raises, DataError on a full disk, and
        where the folder is no longer this user's.
        """
        with opened(self.folder) as folder:
            fd = _open_whole(folder, f"{name}.shard", size)
            if fd is not None and right(fd):
                return fd
            _close(fd)
            with locked(self.folder / f"{name}.lock", wait=True):
                fd = _open_whole(folder, f"{name}.shard", size)  # another process may have been quicker
                if fd is not None and not right(fd):
                    _close(fd)
                    fd = None
                if fd is None:
                    self.sweep()
                    fd = self._fetch(folder, name, size or 0, fetch)
            return fd

    def sweep(self) -> int:
        """Remove what killed processes left half-written; returns how many files. Others' fetches go on undisturbed."""
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
        """Write the file and give it its name; a descriptor to read it by.

        Opened before it has its name: from then on another process, short of room, may remove it at any moment.
        """
        partial = f"{name}.partial"
        try:
            with os.fdopen(create_own_file(folder, partial), "w+b") as file:
                with self._counting():
                    self._make_room(size)
                    file.truncate(size)
                fetch(file)
                file.truncate()
                file.flush()
                fsync_file(file.fileno(), self.folder / partial)
                fd = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.rename(partial, f"{name}.shard", src_dir_fd=folder, dst_dir_fd=folder)
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
        """Nobody else counts files, makes room or takes it meanwhile."""
        return locked(self.folder / ".lock", wait=True)

    def _make_room(self, size: int) -> None:
        """Remove whole files until there is room for `size` bytes more, or none are left."""
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
        os.utime(fd)  # what is used stays
    return fd


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
