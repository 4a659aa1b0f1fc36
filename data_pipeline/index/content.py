"""What a shard holds, as values that change when its bytes do: a checksum of all of it, and a sketch for a quick check.

The checksum is made once, while indexing, and is part of the data set's fingerprint. Reading all shards at every start would
take as long as an epoch's reading, so the index also keeps each shard's modification time and a sketch: a digest of `BLOCKS`
blocks spread evenly over it, which is all of a small shard. A shard whose size and time match is accepted; if the time differs
(a copy, a shard written again) the sketch decides. `tarflow data verify` reads everything.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tarflow.files import open_regular

BLOCK = 16 << 10
BLOCKS = 64
_CHUNK = 4 << 20  # bytes read at a time


@dataclass(frozen=True)
class ShardContent:
    """The state of a shard's file. `modified_ns`: modification time; `checksum`: CRC-32, hex; `sketch`: hex."""

    file_bytes: int = 0
    modified_ns: int = 0
    checksum: str = ""
    sketch: str = ""


def content_of(path: Path) -> ShardContent:
    """The state of a file; reads all of it. Raises OSError."""
    fd = open_regular(path)
    try:
        status = os.fstat(fd)
        return ShardContent(
            status.st_size, status.st_mtime_ns, checksum_of_file(fd), sketch_of_file(fd, status.st_size)
        )
    finally:
        os.close(fd)


def checksum_of_file(fd: int) -> str:
    """CRC-32, hex, of all of an open file. Raises OSError."""
    value = position = 0
    buffer = bytearray(min(_CHUNK, max(os.fstat(fd).st_size, 1)))
    view = memoryview(buffer)
    while got := os.preadv(fd, [buffer], position):
        value = zlib.crc32(view[:got], value)
        position += got
    return f"{value:08x}"


def sketch_of_file(fd: int, size: int, blocks: int = BLOCKS) -> str:
    """The sketch of an open file of `size` bytes. Raises OSError."""
    return sketch(lambda offset, count: os.pread(fd, count, offset), size, blocks)


def sketch(read: Callable[[int, int], bytes], size: int, blocks: int = BLOCKS) -> str:
    """Digest of at most `blocks` blocks out of `size` bytes, with the first and the last; `read(offset, count)` gives bytes."""
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    starts = np.arange(0, size, BLOCK)
    if len(starts) > blocks:
        starts = np.linspace(0, size - BLOCK, blocks).astype(np.int64)
    for start in starts.tolist():
        digest.update(read(start, min(BLOCK, size - start)))
    return digest.hexdigest()
