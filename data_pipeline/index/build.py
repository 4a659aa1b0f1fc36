"""Index a data set: scan its shards, and report what was found in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.classes import CLASSES_FILE, read_classes
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.index.labels_seen import LabelsSeen
from tarflow.data_pipeline.index.samples import MAX_EXAMPLES, Rules, Samples
from tarflow.data_pipeline.index.scan_jobs import run_jobs, scan_jobs
from tarflow.data_pipeline.index.writer import IndexWriter
from tarflow.data_pipeline.layout.names import shown, storable

_LISTED = 20  # empty shards


@dataclass
class BuildReport:
    """What indexing met: counts by cause, and the first messages, for the log."""

    shards: int = 0
    samples: int = 0
    empty_shards: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    seen: LabelsSeen = field(default_factory=LabelsSeen)
    older: list[str] = field(default_factory=list)  # what the index before said, and this one does not

    def add(self, path: Path, samples: Samples) -> None:
        """Count a shard."""
        self.shards += 1
        self.samples += len(samples.keys)
        self.ignored += samples.ignored
        self.problems += samples.problems
        self.examples += samples.examples[: max(0, MAX_EXAMPLES - len(self.examples))]
        self.seen.add(samples)
        if not samples.keys:
            self.empty_shards.append(shown(path))

    def lines(self) -> list[str]:
        """The report as plain lines."""
        out = [f"{self.shards} shards, {self.samples} samples"]
        out += [f"empty shard: {name}" for name in self.empty_shards[:_LISTED]]
        out += self.seen.lines() + self.older + self.causes()
        return out + [f"left out: {message}" for message in self.examples]

    def causes(self) -> list[str]:
        """The lines about what was ignored and left out."""
        return by_cause("ignored members", self.ignored) + by_cause("left out", self.problems)


def by_cause(title: str, counts: Counter[str]) -> list[str]:
    """A report's line such as "left out: empty_image 1, malformed_label 3"; none without counts."""
    return [f"{title}: " + ", ".join(f"{cause} {count}" for cause, count in sorted(counts.items()))] if counts else []


def build_index(
    root: Path,
    shards: Sequence[Path],
    *,
    on_error: str = "strict",
    classes: list[str] | None = None,
    label_field: str | None = None,
    image_field: str | None = None,
    origin: list[str] | None = None,
    image_size: tuple[int, int] | None = None,
    crop: str | None = None,
    measure: bool = False,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Index, BuildReport]:
    """Scan `shards` and write `root/index`, replacing an older one only when the new one is complete.

    `shards` are tars, or one folder that holds an MDS set (`mds.INDEX_FILE`). `on_error`: `strict` or `skip`. `classes`
    defaults to the names in `root/classes.json`, or beside the shards, where that file exists. `label_field`, `image_field`,
    `measure`: see `samples.Rules`. `origin`: lines about where the data came from and what was inferred, kept in the index.
    `image_size` (width, height): recorded when the caller knows that all images have it; so is `crop`, the rule
    that gave it to them; without these, what an older index says of the same shards. `processes`: how many scan at once
    (None: as many as there are cores, one for small sets). `progress(done, total)` is called after each shard. Raises
    DataError: in strict mode for the first damaged or odd sample, always for an empty data set.
    """
    _check(root, shards, on_error)
    names_from = ""
    if classes is None:
        # With --out elsewhere the names may be beside the shards.
        classes, names_from = read_classes(root) or read_classes(_folder_of(shards)), CLASSES_FILE
    rules = Rules(on_error == "strict", label_field, image_field, classes, measure)
    jobs, form = scan_jobs(shards, rules)
    report = BuildReport(seen=LabelsSeen(form, classes, names_from))
    with IndexWriter(root, classes, image_size, crop) as writer:
        for done, (path, content, samples) in enumerate(run_jobs(jobs, processes), start=1):
            report.add(path, samples)
            writer.add(path, content, samples)
            if progress:
                progress(done, len(jobs))
        if not report.samples:
            causes = f" ({', '.join(report.causes())})" if report.causes() else ""
            first = f"the first is {shown(shards[0])}"
            raise DataError(f"no sample found in any of the {len(jobs)} shards of {root}, {first}{causes}")
        # With --out elsewhere there may be an index beside the shards, as there may be names.
        older = _older(root) or _older(_folder_of(shards))
        report.older = writer.take_over(older) if older else []
        writer.finish(form, rules, (origin or []) + report.seen.lines() + report.older)
    return Index(root), report


def _older(root: Path) -> Index | None:
    """The index of a folder; None where there is none that can be read."""
    with suppress(DataError):
        return Index(root) if (root / "index").is_dir() else None
    return None


def _check(root: Path, shards: Sequence[Path], on_error: str) -> None:
    """Raise DataError for what could not be indexed, before anything is read."""
    if on_error not in ("strict", "skip"):
        raise DataError(f"on_error is {on_error!r}, it must be strict or skip")
    if not shards:
        raise DataError(f"no shards to index in {root}")
    for path in (root, *shards):
        if not storable(path):
            raise DataError(f"the name {shown(path)} is not UTF-8, an index cannot hold it: rename it")


def _folder_of(shards: Sequence[Path]) -> Path:
    """The folder that holds all shards; of an MDS set, which is given as its folder, that one."""
    if len(shards) == 1 and shards[0].is_dir():
        return shards[0]
    return Path(os.path.commonpath([path.absolute().parent for path in shards]))
