"""Shards that changed after indexing. A `stat` suffices where nothing did; where size or time differ, a sketch decides.

Remote data are checked against the index's checksums when they are fetched (`remote_shards`).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.content import sketch_of_file
from tarflow.data_pipeline.index.index import Index
from tarflow.files import open_regular

_THREADS = 16  # they mostly wait for the file system


def check_open_shard(index: Index, shard: int, fd: int, *, by_size: bool = False) -> None:
    """Raise DataError unless the open file is the shard that was indexed, by its size and sketch, or `by_size` alone."""
    status, expected = os.fstat(fd), int(index.shard_bytes[shard])
    path = index.shard_path(shard)
    if status.st_size != expected:
        raise DataError(
            f"shard {path} has {status.st_size} bytes, the index says {expected}: it was changed after indexing; "
            f"run `tarflow data index {index.root}`"
        )
    content = index.shard_content(shard)
    if content is None or by_size or status.st_mtime_ns == content.modified_ns:
        return
    try:
        same = sketch_of_file(fd, expected) == content.sketch
    except OSError as err:
        raise DataError(f"cannot read shard {path}: {err.strerror}") from None
    if not same:
        raise DataError(
            f"shard {path} holds other bytes than when it was indexed, in a file of the same size: put the old one back, or "
            f"run `tarflow data index {index.root}`"
        )


def check_shards(index: Index) -> None:
    """Check all shards in the file system before work starts. Raises DataError for the first that changed.

    Shards that are missing or cannot be opened are left to the reader, which has a policy for them.
    """
    if not index.knows_content:
        return
    local = [
        shard for shard in range(len(index.shard_sizes)) if index.shard_sizes[shard] and not index.is_remote(shard)
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda shard: _check(index, shard), local):
            pass


def _check(index: Index, shard: int) -> None:
    path, content = index.shard_path(shard), index.shard_content(shard)
    try:
        status = path.stat()
        if content and (status.st_size, status.st_mtime_ns) == (content.file_bytes, content.modified_ns):
            return
        fd = open_regular(path)
    except OSError:
        return
    try:
        check_open_shard(index, shard, fd)
    finally:
        os.close(fd)
