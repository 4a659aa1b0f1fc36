"""Bytes of shards on a local or shared file system: positioned reads through a bounded number of open files.

It holds nothing else, so a killed reader leaves nothing behind.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.storage.changed_shards import check_open_shard
from tarflow.files import open_regular

OPEN_FILES = 64


class ShardFiles(Protocol):
    """Where a reader gets its bytes from."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Exactly `size` bytes at `offset` of a shard. Raises BadSampleError, or DataError where continuing is pointless."""

    def close(self) -> None:
        """Close what is open."""


class OpenFiles:
    """Descriptors of at most `most` shards, opened by `open_shard`; the least recently used one is closed first."""

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
    """The shards of an index in the file system. Not to be shared between threads.

    `by_size`: refuse only a shard of another size; for a reader that checks all contents itself.
    """

    def __init__(self, index: Index, *, by_size: bool = False) -> None:
        self.index = index
        self._by_size = by_size
        self._files = OpenFiles(OPEN_FILES, self._open)
        self._checked: set[int] = set()  # their sketch is compared once

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """See `ShardFiles`. A shard that changed after indexing is refused before anything is read from it."""
        return read_at(self._files.of(shard), offset, size)

    def close(self) -> None:
        """Close the shards."""
        self._files.close()

    def _open(self, shard: int) -> int:
        path = self.index.shard_path(shard)
        try:
            fd = open_regular(path)
        except OSError as err:
            raise BadSampleError("missing_shard", f"cannot open the shard: {err.strerror}") from None
        try:
            check_open_shard(self.index, shard, fd, by_size=self._by_size or shard in self._checked)
        except DataError:
            os.close(fd)
            raise
        self._checked.add(shard)
        return fd


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Exactly `size` bytes of an open file. Raises BadSampleError (`unreadable`, `cut_short`)."""
    try:
        data = os.pread(fd, size, offset)
        while len(data) < size:  # network file systems may return less than was asked for
            more = os.pread(fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
    except OSError as err:
        raise BadSampleError("unreadable", f"cannot read {size} bytes at {offset}: {err.strerror}") from None
    if len(data) < size:
        raise BadSampleError("cut_short", f"only {len(data)} of {size} bytes at {offset} exist")
    return data
