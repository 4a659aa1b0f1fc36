"""The shards of a stream by name, and what identifies them as far as that is known before they are read."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.content import sketch_of_file
from tarflow.data_pipeline.index.patterns import expand_braces, find_shards
from tarflow.data_pipeline.layout.splits import by_split
from tarflow.data_pipeline.storage.access import address
from tarflow.data_pipeline.storage.roots import check_name
from tarflow.files import open_regular

_SKETCH_BLOCKS = 4  # of each shard, read by every rank at its start


def stream_shards(data: str | Path) -> list[str]:
    """What webdataset opens, one entry per shard. Braces are expanded everywhere, wildcards in the file system."""
    text = str(data)
    if text.startswith("pipe:"):
        return expand_braces(text)
    url = address(data)
    if url:
        check_name(url)
        if any(mark in url for mark in "'\"`<> "):
            raise DataError(
                f"{url!r} is not an address of tars: programs that open addresses would run parts of it as commands"
            )
        return expand_braces(url)
    shards, _ = find_shards(text)
    several = by_split(shards, Path(os.path.commonpath([path.parent for path in shards])))
    if len(several) > 1:
        names = ", ".join(split or "none" for split in several)
        raise DataError(
            f"the shards at {text} name several splits ({names}): name those of one, e.g. with a pattern, or index "
            "all as one set: tarflow data index --split all"
        )
    return [str(path) for path in shards]


def stream_fingerprint(shards: list[str]) -> str:
    """A digest of the names of the shards and, of those in the file system, of their sizes and some blocks.

    No more is known before they are read; for pipes and addresses, the names alone.
    """
    with ThreadPoolExecutor(16) as pool:
        sketches = list(pool.map(_sketch, shards))
    if not any(sketches):
        return fingerprint_of_names(shards)
    return fingerprint_of_names([f"{name}\0{sketch}" for name, sketch in zip(shards, sketches)])


def fingerprint_of_names(names: list[str]) -> str:
    """The fingerprint of a stream as in version 0.1: of the shards' names alone."""
    return "stream-" + hashlib.sha256("\n".join(names).encode()).hexdigest()[:25]


def _sketch(shard: str) -> str:
    """Digest of a few blocks of a file; empty for what is not a file or cannot be read: reading it will fail and say why."""
    try:
        fd = open_regular(shard)
    except OSError:
        return ""
    try:
        return sketch_of_file(fd, os.fstat(fd).st_size, _SKETCH_BLOCKS)
    except OSError:
        return ""
    finally:
        os.close(fd)
