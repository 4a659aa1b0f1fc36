"""Look at every sample of an indexed data set: does it decode, is its label in range, does the tar match the index."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.errors import BadSampleError, DataError
from data_pipeline.index import NO_LABEL, Index
from data_pipeline.reader import SampleReader
from data_pipeline.samples import group
from data_pipeline.tar_scan import scan_tar

_NAMED = 50


@dataclass
class VerifyReport:
    """What was found. `problems`: count by cause; `examples`: the first messages, each naming shard and sample."""

    shards: int = 0
    samples: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "shards": self.shards, "samples": self.samples, "problems": dict(self.problems), "examples": self.examples,
            "labels": {str(label): count for label, count in sorted(self.labels.items())},
        }  # fmt: skip

    def lines(self) -> list[str]:
        """The report as plain lines."""
        out = [f"{self.shards} shards, {self.samples} samples looked at"]
        if self.problems:
            out.append("problems: " + ", ".join(f"{cause} {n}" for cause, n in sorted(self.problems.items())))
            return out + self.examples
        return [*out, "no problems found"]

    def add(self, cause: str, message: str) -> None:
        """Count a problem and keep its message if it is among the first."""
        self.problems[cause] += 1
        if len(self.examples) < _NAMED:
            self.examples.append(message)


def verify(
    index: Index, *, threads: int | None = None, progress: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Check every shard of `index`, several at a time. `progress(samples done, samples in all)` after each shard."""
    report = VerifyReport()
    keys: set[str] = set()
    workers = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for shard, part in enumerate(pool.map(lambda shard: _verify_shard(index.root, shard), _shards(index))):
            report.shards += 1
            report.samples += part.samples
            report.labels += part.labels
            report.problems += part.problems
            report.examples += part.examples[: max(0, _NAMED - len(report.examples))]
            for key in index.read(shard, ["key"])["key"].to_pylist():
                if key in keys:
                    report.add("key_in_two_shards", f"shard {index.shard_path(shard)}: key {key!r} came before")
                keys.add(key)
            if progress:
                progress(report.samples, index.num_samples)
    return report


def _shards(index: Index) -> range:
    return range(len(index.shard_sizes))


def _verify_shard(root: Any, shard: int) -> VerifyReport:
    """One shard, with an index of its own: caches and open files are not shared between threads."""
    index = Index(root)
    report = VerifyReport()
    path = index.shard_path(shard)
    try:
        scan = scan_tar(path)
        found = group(scan, str(path), strict=False, classes=index.classes)
    except DataError as err:
        report.add("unreadable_shard", str(err))
        return report
    for cause, count in found.problems.items():
        report.problems[cause] += count
    report.examples += found.examples
    rows = index.rows(shard)
    if found.offsets != rows.offsets.tolist() or found.sizes != rows.sizes.tolist():
        report.add("index_differs", f"shard {path}: its members are not where the index says; index it anew")
        return report
    classes = index.num_classes or 0
    reader = SampleReader(index, image_size=1, channels=3, num_classes=0)
    for row, label in enumerate(rows.labels.tolist()):
        report.samples += 1
        if label == NO_LABEL:
            report.labels[-1] += 1
        else:
            report.labels[label] += 1
            if not 0 <= label < classes:
                where = f"shard {path}, sample {index.key(shard, row)!r}"
                report.add("label_out_of_range", f"{where}: label {label} is outside 0..{classes - 1}")
        try:
            reader.read_full(int(index.shard_starts[shard]) + row)
        except BadSampleError as err:
            report.add(err.cause, str(err))
        except DataError as err:
            report.add("unreadable_shard", str(err))
            break
    reader.close()
    return report


def contact_sheet(index: Index, count: int, tile: int) -> np.ndarray:
    """uint8 [H, W, 3]: `count` samples spread evenly over the data set as tiles of `tile` pixels, in rows."""
    reader = SampleReader(index, image_size=tile, channels=3, num_classes=0)
    count = min(count, index.num_samples)
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    sheet = np.full((rows * (tile + 2), columns * (tile + 2), 3), 255, dtype=np.uint8)
    for place in range(count):
        try:
            image, _ = reader.read(place * index.num_samples // count)
        except BadSampleError:
            image = np.full((tile, tile, 3), 128, dtype=np.uint8)
        y, x = place // columns * (tile + 2), place % columns * (tile + 2)
        sheet[y : y + tile, x : x + tile] = image
    reader.close()
    return sheet
