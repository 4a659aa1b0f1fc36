"""How many samples the shards of a stream hold, as far as they were read; a stream resumes at the nearest one."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from tarflow.data_pipeline.storage.cache_folder import make_cache_folder, write_own_file
from tarflow.files import listed
from tarflow.records import DamagedFileError, read_object, sealed

log = logging.getLogger("tarflow.data")


class ShardCounts:
    """Samples in the shards read so far, kept in a small file per rank in the cache folder; all ranks' files are read.

    They decide only at which shard a stream resumes: a damaged file is logged and rebuilt.
    """

    def __init__(self, folder: Path, shards: list[str], who: str) -> None:
        name = hashlib.sha256("\n".join(shards).encode()).hexdigest()[:24]
        self.path = folder / f"stream-{name}-{who}.json"
        self.counts: dict[int, int] = {}
        if not folder.exists():
            return
        for path in listed(make_cache_folder(folder), f"stream-{name}-*.json"):
            try:
                self.counts.update(_counts(read_object(path, way_out="it is rebuilt"), len(shards), path))
            except (OSError, DamagedFileError) as err:
                log.warning("%s", err)

    def of(self, shard: int) -> int | None:
        """Samples in a shard; if unknown, the mean of the known ones; None if none is known."""
        if shard in self.counts or not self.counts:
            return self.counts.get(shard)
        return max(1, round(sum(self.counts.values()) / len(self.counts)))

    def learn(self, shard: int, count: int) -> int:
        """Remember a count; returns it. Raises DataError where the cache folder is not this user's."""
        if self.counts.get(shard) != count:
            self.counts[shard] = count
            plain = {str(number): samples for number, samples in self.counts.items()}
            try:
                write_own_file(make_cache_folder(self.path.parent), self.path.name, json.dumps(sealed(plain)).encode())
            except OSError as err:
                log.warning("cannot keep the counts of the shards in %s: %s", self.path, err)
        return count


def _counts(found: dict[str, Any], shards: int, path: Path) -> dict[int, int]:
    """The counts in a file of them. Raises DamagedFileError."""
    for shard, count in found.items():
        right = shard.isascii() and shard.isdigit() and len(shard) < 10 and int(shard) < shards
        if not right or type(count) is not int or not 0 <= count < 1 << 40:
            raise DamagedFileError(path, f"{str(count)[:40]} samples", "it is rebuilt", where=shard[:40])
    return {int(shard): count for shard, count in found.items()}
