"""Scan shards one by one or in several processes: a job is one shard, its result the samples in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.bounds import MAX_BYTES
from tarflow.data_pipeline.images.opening import size_of
from tarflow.data_pipeline.index.content import ShardContent, content_of
from tarflow.data_pipeline.index.mds import INDEX_FILE, MdsShard, mds_shards, scan_mds
from tarflow.data_pipeline.index.processes import cores, in_processes
from tarflow.data_pipeline.index.samples import Rules, Samples
from tarflow.data_pipeline.index.tar.grouping import group
from tarflow.data_pipeline.index.tar.scan import SMALL, scan_tar
from tarflow.data_pipeline.layout.names import shown
from tarflow.files import open_to_read

_MIN_BYTES = 1 << 30  # of shards for which starting processes takes less time than it saves
_JSON_BYTES = 4096  # of a JSON member that is kept as it passes by
_HEAD = 1 << 16  # bytes that hold the size of nearly every image; the rest is read when they do not


@dataclass(frozen=True)
class Job:
    """One shard to scan; everything a process must know. `first`: number of its first sample in the set (MDS)."""

    shard: Path | MdsShard
    rules: Rules
    first: int = 0

    @property
    def path(self) -> Path:
        """The shard's file."""
        return self.shard.path if isinstance(self.shard, MdsShard) else self.shard

    def run(self) -> tuple[Path, ShardContent, Samples]:
        """(path, state of the file, samples). The file is read whole first: the scan then finds it in memory."""
        content, problem = ShardContent(), None
        try:
            content = content_of(self.path)
        except OSError as err:
            problem = err
        samples = self.scan()  # names what is wrong with the file, or counts it
        if problem is not None and samples.keys:
            raise DataError(f"cannot read shard {self.path}: {problem.strerror}")
        if self.rules.measure and samples.keys:
            _measure(self.path, samples)
        return self.path, content, samples

    def scan(self) -> Samples:
        """The samples alone. Raises DataError."""
        if isinstance(self.shard, MdsShard):
            return scan_mds(self.shard, self.first, self.rules)
        in_json = ":" in (self.rules.label_field or "")
        return group(scan_tar(self.shard, _JSON_BYTES if in_json else SMALL), shown(self.shard), self.rules)


def scan_jobs(shards: Sequence[Path], rules: Rules) -> tuple[list[Job], str]:
    """(jobs in order, `tar` or `mds`). An MDS set is given as the one folder that holds its `index.json`."""
    if len(shards) == 1 and (shards[0] / INDEX_FILE).is_file():
        jobs, first = [], 0
        for shard in mds_shards(shards[0]):
            jobs.append(Job(shard, rules, first))
            first += shard.samples
        return jobs, "mds"
    return [Job(path, rules) for path in shards], "tar"


def run_jobs(jobs: Sequence[Job], processes: int | None) -> Iterator[tuple[Path, ShardContent, Samples]]:
    """The results in order. Errors are raised when their turn comes, so the first bad shard is the one named."""
    if processes is None:
        processes = min(cores(), len(jobs))
        if sum(map(_size, jobs)) < _MIN_BYTES:
            processes = 1
    yield from in_processes(Job.run, jobs, processes)


def _size(job: Job) -> int:
    if isinstance(job.shard, MdsShard):
        return job.shard.file_bytes
    try:
        return job.shard.stat().st_size
    except OSError:  # its scan will name what is wrong
        return 0


def _measure(path: Path, samples: Samples) -> None:
    """Fill in width and height as stored, from the first bytes of each image; None where that is not enough."""
    with open_to_read(path) as file:
        sizes = [_size_of_image(file, offset, size) for offset, size in zip(samples.offsets, samples.sizes)]
    samples.widths = [size[0] if size else None for size in sizes]
    samples.heights = [size[1] if size else None for size in sizes]


def _size_of_image(file: BinaryIO, offset: int, size: int) -> tuple[int, int] | None:
    for amount in dict.fromkeys((min(size, _HEAD), min(size, MAX_BYTES))):
        file.seek(offset)
        found = size_of(file.read(amount))
        if found:
            return found
    return None
