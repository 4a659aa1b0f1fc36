"""Bytes of shards on a local or shared file system: positioned reads through a bounded number of open files.

Nothing else is held, so a killed reader leaves nothing behind.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.index.index import Index

OPEN_FILES = 64


class ShardFiles(Protocol):
    """Where a reader gets its bytes from."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Exactly `size` bytes at `offset` of a shard. Raises BadSampleError, or DataError where going on is no use."""

    def close(self) -> None:
        """Give back what is held."""


class OpenFiles:
    """Descriptors of at most `most` shards, opened by `open_shard`; the one that was used longest ago is closed first."""

    def __init__(self, most: int, open_shard: Callable[[int], int]) -> None:
        self._most, self._open = most, open_shard
        self._files: OrderedDict[int, int] = OrderedDict()

    def of(self, shard: int) -> int:
        """The descriptor of a shard. Raises what opening it raises."""
        fd = self._files.get(shard)
        if fd is None:
            fd = self._files[shard] = self._open(shard)
            while len(self._files) > self._most:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(shard)
        return fd

    def close(self) -> None:
        """Close them all."""
        while self._files:
            os.close(self._files.popitem()[1])


class LocalShards:
    """The shards of an index that lie in the file system. Not to be shared between threads."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files = OpenFiles(OPEN_FILES, self._open)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """See `ShardFiles`. A shard whose size is not the index's is refused before anything is read from it."""
        return read_at(self._files.of(shard), offset, size)

    def close(self) -> None:
        """Close the shards."""
        self._files.close()

    def _open(self, shard: int) -> int:
        path = self.index.shard_path(shard)
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as err:
            raise BadSampleError("missing_shard", f"cannot open the shard: {err.strerror}") from None
        size, expected = os.fstat(fd).st_size, int(self.index.shard_bytes[shard])
        if size != expected:
            os.close(fd)
            raise DataError(
                f"shard {path} has {size} bytes, the index says {expected}: it was changed after indexing; "
                f"run `tarflow data index {self.index.root}`"
            )
        return fd


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Exactly `size` bytes of an open file. Raises BadSampleError (`unreadable`, `cut_short`)."""
    try:
        data = os.pread(fd, size, offset)
        while len(data) < size:  # network file systems may give less than was asked for
            more = os.pread(fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
    except OSError as err:
        raise BadSampleError("unreadable", f"cannot read {size} bytes at {offset}: {err.strerror}") from None
    if len(data) < size:
        raise BadSampleError("cut_short", f"only {len(data)} of {size} bytes at {offset} are there")
    return data
