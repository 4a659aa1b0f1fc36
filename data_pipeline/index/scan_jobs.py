"""Scanning shards one by one or in several processes: a job is one shard, its result the samples in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.bounds import MAX_BYTES
from tarflow.data_pipeline.images.opening import size_of
from tarflow.data_pipeline.index.content import ShardContent, content_of
from tarflow.data_pipeline.index.mds import INDEX_FILE, MdsShard, mds_shards, scan_mds
from tarflow.data_pipeline.index.processes import cores, in_processes
from tarflow.data_pipeline.index.samples import Samples
from tarflow.data_pipeline.index.tar.grouping import group
from tarflow.data_pipeline.index.tar.scan import SMALL, scan_tar
from tarflow.data_pipeline.layout.names import shown

_WORTH_IT = 1 << 30  # bytes of shards below which starting processes takes longer than the scan
_HEAD = 1 << 16  # bytes that hold the size of nearly every image; the rest is read when they do not


@dataclass(frozen=True)
class Job:
    """One shard to scan; everything a process must know. `first`: number of its first sample (MDS)."""

    shard: Path | MdsShard
    strict: bool
    label_field: str | None
    classes: list[str] | None
    measure: bool
    first: int = 0
    image_field: str | None = None

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
        samples = self.scan()  # says what is wrong with the file, or counts it
        if problem is not None and samples.keys:
            raise DataError(f"cannot read shard {self.path}: {problem.strerror}")
        if self.measure:
            _measure(self.path, samples)
        return self.path, content, samples

    def scan(self) -> Samples:
        """The samples alone. Raises DataError."""
        if isinstance(self.shard, MdsShard):
            return scan_mds(
                self.shard, self.first, strict=self.strict, label_field=self.label_field, classes=self.classes,
                image_field=self.image_field,
            )  # fmt: skip
        field = self.label_field or "cls"
        scan = scan_tar(self.shard, keep=4096 if ":" in field else SMALL)
        return group(
            scan,
            shown(self.shard),
            strict=self.strict,
            label_field=field,
            classes=self.classes,
            image_field=self.image_field,
        )


def scan_jobs(
    shards: Sequence[Path], *, strict: bool, label_field: str | None, classes: list[str] | None, measure: bool,
    image_field: str | None = None,
) -> tuple[list[Job], str]:  # fmt: skip
    """(jobs in order, `tar` or `mds`). An MDS set is given as the one folder that holds its `index.json`."""
    if len(shards) == 1 and (shards[0] / INDEX_FILE).is_file():
        jobs, first = [], 0
        for shard in mds_shards(shards[0]):
            jobs.append(Job(shard, strict, label_field, classes, measure, first, image_field))
            first += shard.samples
        return jobs, "mds"
    return [Job(path, strict, label_field, classes, measure, 0, image_field) for path in shards], "tar"


def run_jobs(jobs: Sequence[Job], processes: int | None) -> Iterator[tuple[Path, ShardContent, Samples]]:
    """The results in order. Errors are raised when their turn comes, so the first bad shard is the one named."""
    if processes is None:
        processes = min(cores(), len(jobs))
        if sum(map(_size, jobs)) < _WORTH_IT:
            processes = 1
    yield from in_processes(Job.run, jobs, processes)


def _size(job: Job) -> int:
    if isinstance(job.shard, MdsShard):
        return job.shard.file_bytes
    try:
        return job.shard.stat().st_size
    except OSError:  # its scan will say what is wrong
        return 0


def _measure(path: Path, samples: Samples) -> None:
    """Fill in width and height as stored, from the first bytes of each image; None where they cannot be told."""

    def side(file: Any, offset: int, size: int) -> tuple[int, int] | tuple[None, None]:
        for amount in dict.fromkeys((min(size, _HEAD), min(size, MAX_BYTES))):
            file.seek(offset)
            found = size_of(file.read(amount))
            if found:
                return found
        return None, None

    if not samples.keys:
        return
    with path.open("rb") as file:
        sides = [side(file, offset, size) for offset, size in zip(samples.offsets, samples.sizes)]
    samples.widths, samples.heights = [w for w, _ in sides], [h for _, h in sides]
