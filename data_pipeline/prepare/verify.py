"""Check every sample of an indexed data set: does it decode, is its label in range, does the shard match the index.

Shards are checked in processes of their own, a bounded number at a time. To find keys and contents that occur twice in the set
without holding all of them, 16 bytes of each go to files by their first bits, and one such file at a time is sorted.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS, check_bytes
from tarflow.data_pipeline.images.decode import decode
from tarflow.data_pipeline.index.content import content_of
from tarflow.data_pipeline.index.index import NO_LABEL, Index
from tarflow.data_pipeline.index.mds import INDEX_FILE, mds_shards
from tarflow.data_pipeline.index.processes import cores, in_processes
from tarflow.data_pipeline.index.samples import Rules, Samples
from tarflow.data_pipeline.index.scan_jobs import Job
from tarflow.data_pipeline.storage.local_shards import LocalShards

_MAX_EXAMPLES = 50
_MARK = np.dtype([("hash", "<u8"), ("sample", "<u8")])


@dataclass
class VerifyReport:
    """What was found. `problems`: count by cause; `examples`: the first messages, each naming shard and sample.

    `identical`: images whose bytes occur earlier in the set. Not a problem by itself, but often one for a held-out split.
    """

    shards: int = 0
    samples: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    identical: int = 0
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "shards": self.shards, "samples": self.samples, "problems": dict(self.problems), "examples": self.examples,
            "labels": {str(label): count for label, count in sorted(self.labels.items())},
            "identical_images": self.identical, "smallest_image": self.smallest, "largest_image": self.largest,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """The report as plain lines."""
        out = [f"{self.shards} shards, {self.samples} samples looked at"]
        if self.smallest and self.largest:
            small, large = ("x".join(map(str, size)) for size in (self.smallest, self.largest))
            out.append(f"images from {small} to {large} pixels, {self.identical} of them identical to another one")
        if self.problems:
            out.append("problems: " + ", ".join(f"{cause} {n}" for cause, n in sorted(self.problems.items())))
            return out + self.examples
        return [*out, "no problems found"]

    def add(self, cause: str, message: str) -> None:
        """Count a problem and keep its message if it is among the first."""
        self.problems[cause] += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(message)

    def saw(self, width: int, height: int) -> None:
        """Record the size of an image, in pixels."""
        size = (width, height)
        self.smallest = min(self.smallest or size, size, key=lambda s: s[0] * s[1])
        self.largest = max(self.largest or size, size, key=lambda s: s[0] * s[1])

    def merge(self, other: VerifyReport) -> None:
        """Add what was found elsewhere."""
        self.shards += other.shards
        self.samples += other.samples
        self.labels += other.labels
        self.problems += other.problems
        self.examples += other.examples[: max(0, _MAX_EXAMPLES - len(self.examples))]
        for size in (other.smallest, other.largest):
            if size:
                self.saw(*size)


def verify(
    index: Index,
    *,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> VerifyReport:
    """Check every shard of `index`, several at a time. `progress(done, total)` counts samples, after each shard.

    Raises DataError for remote data: every byte is read, which belongs on the machine that holds the shards.
    """
    if index.any_remote:
        index.shard_path(next(shard for shard in range(len(index.shard_sizes)) if index.is_remote(shard)))
    report = VerifyReport()
    jobs = [(str(index.root), shard, max_pixels) for shard in range(len(index.shard_sizes))]
    if processes is None:
        processes = cores() if index.num_samples > 2000 else 1
    with tempfile.TemporaryDirectory(prefix="tarflow-verify-") as folder:
        keys, contents = _Marks(Path(folder) / "keys"), _Marks(Path(folder) / "contents")
        for part, key_marks, content_marks in in_processes(_verify_shard, jobs, processes):
            report.merge(part)
            keys.add(key_marks)
            contents.add(content_marks)
            if progress:
                progress(report.samples, index.num_samples)
        for first, again in keys.repeated():
            (shard, row), (other, its_row) = index.locate(first), index.locate(again)
            key = index.key(other, its_row)
            if index.key(shard, row) == key:  # not only the same hash
                report.add(
                    "key_in_two_shards",
                    f"shard {index.shard_place(other)}: key {key!r} is also in {index.shard_place(shard)}",
                )
        report.identical = sum(1 for _ in contents.repeated())
    return report


class _Marks:
    """(hash, sample) of everything seen, in 256 files by the first byte of the hash: one of them at a time fits in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def add(self, marks: NDArray[np.void]) -> None:
        buckets = (marks["hash"] >> np.uint64(56)).astype(np.int64)
        order = np.argsort(buckets, kind="stable")
        for piece in np.split(marks[order], np.flatnonzero(np.diff(buckets[order])) + 1):
            if len(piece):
                with (self.folder / f"{int(piece['hash'][0]) >> 56:03d}").open("ab") as file:
                    piece.tofile(file)

    def repeated(self) -> Iterator[tuple[int, int]]:
        """(first sample, later sample) for every sample whose hash came before."""
        for path in sorted(self.folder.iterdir()):
            marks = np.sort(np.fromfile(path, _MARK), order=["hash", "sample"])
            first = 0
            for at in (np.flatnonzero(np.diff(marks["hash"]) == 0) + 1).tolist():
                if marks["hash"][first] != marks["hash"][at]:
                    first = at - 1
                yield int(marks["sample"][first]), int(marks["sample"][at])


def _verify_shard(job: tuple[str, int, int]) -> tuple[VerifyReport, NDArray[np.void], NDArray[np.void]]:
    """(what was found, marks of keys, marks of contents) of one shard, with an index of its own."""
    root, shard, max_pixels = job
    index = Index(Path(root))
    report = VerifyReport(shards=1)
    path, rows = index.shard_path(shard), index.rows(shard)
    nothing = np.zeros(0, _MARK)
    try:
        found = _scan(index, shard)
    except DataError as err:
        report.add("unreadable_shard", str(err))
        return report, nothing, nothing
    report.problems += found.problems
    report.examples += found.examples
    if found.offsets != rows.offsets.tolist() or found.sizes != rows.sizes.tolist():
        report.add("index_differs", f"shard {path}: its members are not where the index says; index it again")
        return report, nothing, nothing
    if [NO_LABEL if label is None else label for label in found.labels] != rows.labels.tolist():
        report.add("index_differs", f"shard {path}: its labels are not those of the index; index it again")
    classes = index.num_classes or 0
    files = LocalShards(index, by_size=True)
    keys, contents = np.zeros(len(found.keys), _MARK), np.zeros(len(found.keys), _MARK)
    try:
        for row, label in enumerate(rows.labels.tolist()):
            report.samples += 1
            where = f"shard {path}, sample {found.keys[row]!r}"
            report.labels[-1 if label == NO_LABEL else label] += 1
            if label != NO_LABEL and not 0 <= label < classes:
                report.add("label_out_of_range", f"{where}: label {label} is outside 0..{classes - 1}")
            sample = int(index.shard_starts[shard]) + row
            keys[row] = (_hash(found.keys[row].encode()), sample)
            try:
                check_bytes(found.sizes[row])
                data = files.read(shard, found.offsets[row], found.sizes[row])
                contents[row] = (_hash(data), sample)
                image = decode(data, 3, None, max_pixels)
                report.saw(image.shape[1], image.shape[0])
            except BadSampleError as err:
                contents[row] = (_hash(where.encode()), sample)
                report.add(err.cause, f"{where}: {err}")
    except DataError as err:
        report.add("unreadable_shard", str(err))
        return report, keys[: report.samples], nothing
    finally:
        files.close()
    stored = index.shard_content(shard)
    if stored is not None and not report.problems and content_of(path).checksum != stored.checksum:
        report.add("content_differs", f"shard {path}: its bytes are not those that were indexed; index it again")
    return report, keys, contents


def _scan(index: Index, shard: int) -> Samples:
    """The samples in the shard now, by the rules that the index was made with."""
    place: Any = index.shard_path(shard)
    if index.form == "mds":
        listed = {entry.path.name: entry for entry in mds_shards(place.parent)}
        if place.name not in listed:
            raise DataError(f"shard {place} is no longer listed in {place.parent / INDEX_FILE}: index the set again")
        place = listed[place.name]
    first = int(index.shard_starts[shard])
    rules = Rules(False, index.meta.get("label_field"), index.meta.get("image_field"), index.classes)
    return Job(place, rules, first).scan()


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
