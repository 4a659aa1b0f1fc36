"""Write the index of a data set: scan the tars, one row group per shard, and put it in place in one step."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.classes import CLASSES_FILE, read_classes
from tarflow.data_pipeline.index.content import ShardContent, content_of
from tarflow.data_pipeline.index.index import FORMAT_VERSION, PART_KEY, SHARDS_PER_PART, Index
from tarflow.data_pipeline.index.labels_seen import LabelsSeen
from tarflow.data_pipeline.index.samples import Samples
from tarflow.data_pipeline.index.scan_jobs import run_jobs, scan_jobs
from tarflow.data_pipeline.index.shard_list import META_KEY, NO_LABEL, SHARD_FIELDS, sealed
from tarflow.data_pipeline.layout.names import shown, storable
from tarflow.files import replace_dir


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

    def lines(self) -> list[str]:
        """The report as plain lines."""
        out = [f"{self.shards} shards, {self.samples} samples"]
        out += [f"empty shard: {name}" for name in self.empty_shards[:20]]
        out += self.seen.lines()
        out += by_cause("ignored members", self.ignored) + by_cause("left out", self.problems)
        return out + [f"left out: {message}" for message in self.examples]


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
    measure: bool = False,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Index, BuildReport]:
    """Scan `shards` and write `root/index`, replacing an older one only when the new one is complete.

    `shards` are tars, or one folder that holds an MDS set (`mds.INDEX_FILE`). `classes` defaults to the names in
    `root/classes.json`, or beside the shards, where that file exists. `label_field`: the field (`cls`), `json:NAME`, or
    the MDS column (found by name). `image_field`: the field or column of the image, where there are several. `origin`:
    lines that say where the data came from and what was inferred, kept in the index. `image_size` (width, height) is
    recorded when the caller knows that all images have it; `measure` reads it from the head of every image instead.
    `processes`: how many scan at once (None: as many as there are cores, one for small sets). `progress(done, total)` is
    called after each shard. Raises DataError: in strict mode for the first damaged or odd sample, always for an empty
    data set.
    """
    if on_error not in ("strict", "skip"):
        raise DataError(f"on_error is {on_error!r}, it must be strict or skip")
    if not shards:
        raise DataError(f"no shards to index in {root}")
    for path in (root, *shards):
        if not storable(path):
            raise DataError(f"the name {shown(path)} is not UTF-8, an index cannot hold it: rename it")
    names_from = ""
    if classes is None:
        # With --out elsewhere the names may be beside the shards.
        classes, names_from = read_classes(root) or read_classes(_folder_of(shards)), CLASSES_FILE
    report = BuildReport()
    jobs, form = scan_jobs(
        shards, strict=on_error == "strict", label_field=label_field, classes=classes, measure=measure,
        image_field=image_field,
    )  # fmt: skip
    report.seen = LabelsSeen(form, classes, names_from)

    def scanned() -> Iterator[tuple[Path, ShardContent, Samples]]:
        for done, (path, content, samples) in enumerate(run_jobs(jobs, processes)):
            report.shards += 1
            report.samples += len(samples.keys)
            report.ignored += samples.ignored
            report.problems += samples.problems
            report.examples += samples.examples[: max(0, 20 - len(report.examples))]
            report.seen.add(samples)
            if not samples.keys:
                report.empty_shards.append(shown(path))
            yield path, content, samples
            if progress:
                progress(done + 1, len(jobs))

    write_index(
        root, scanned(), classes=classes, image_size=image_size, form=form, label_field=label_field, image_field=image_field,
        origin=lambda: (origin or []) + report.seen.lines(),
        what_else=lambda: ", ".join(by_cause("ignored members", report.ignored) + by_cause("left out", report.problems)),
    )  # fmt: skip
    return Index(root), report


def _folder_of(shards: Sequence[Path]) -> Path:
    """The folder that holds all shards; of an MDS set, which is given as its folder, that one."""
    if len(shards) == 1 and shards[0].is_dir():
        return shards[0]
    return Path(os.path.commonpath([path.absolute().parent for path in shards]))


def write_index(
    root: Path,
    shards: Iterable[tuple[Path, ShardContent, Samples]],
    *,
    classes: list[str] | None,
    image_size: tuple[int, int] | None = None,
    form: str = "tar",
    label_field: str | None = None,
    what_else: Callable[[], str] = str,
    image_field: str | None = None,
    origin: Callable[[], list[str]] | None = None,
) -> None:
    """Write (path, state of the file, samples) of each shard as `root/index`. Raises DataError if there are no samples.

    `form`: what the shards are, `tar` or `mds`. `label_field`: where the labels came from, and `image_field`,
    the images, for `data verify`. `origin`: asked at the end for lines about what was inferred.
    `what_else()`: what was met besides, for the error.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = root / "index.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    schema = _sample_schema(image_size)
    writer: Any = None
    table: dict[str, list[Any]] = {name: [] for name in SHARD_FIELDS}
    part_digests: list[str] = []
    digest_of_part = hashlib.sha256()
    whole = hashlib.sha256(json.dumps([FORMAT_VERSION, classes]).encode())
    places = whole.copy()  # what earlier versions took for the fingerprint: their runs go on by it
    in_part = 0
    resolved = root.resolve()
    try:
        for number, (path, content, samples) in enumerate(shards):
            name = os.path.relpath(path.resolve(), resolved)
            digest_of_places = _digest(name, content.file_bytes, samples)
            places.update(digest_of_places.encode())
            digest = hashlib.sha256(f"{digest_of_places}\0{content.checksum}".encode()).hexdigest()[:32]
            whole.update(digest.encode())
            labels = [label for label in samples.labels if label is not None]
            rows = len(samples.keys)
            values = (
                name, rows, content.file_bytes, len(part_digests) if rows else -1, in_part if rows else -1, len(labels),
                min(labels, default=None), max(labels, default=None), digest,
                content.modified_ns, content.checksum, content.sketch,
            )  # fmt: skip
            for column, value in zip(SHARD_FIELDS, values):
                table[column].append(value)
            if not rows:
                continue
            if writer is None:
                path_of_part = _part_path(partial, len(part_digests))
                writer = pq.ParquetWriter(path_of_part, schema, compression="zstd", write_page_checksum=True)
            columns = [
                pa.array([number] * rows, pa.int32()),
                pa.array(samples.keys, pa.string()),
                pa.array(samples.offsets, pa.int64()),
                pa.array(samples.sizes, pa.int64()),
                _extensions(samples.extensions),
                pa.array(samples.labels, pa.int64()),
                _side(image_size[0] if image_size else samples.widths, rows),
                _side(image_size[1] if image_size else samples.heights, rows),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=rows)
            digest_of_part.update(digest.encode())
            in_part += 1
            if in_part == SHARDS_PER_PART:
                part_digests.append(_close_part(writer, digest_of_part))
                writer, digest_of_part, in_part = None, hashlib.sha256(), 0
        if writer is not None:
            part_digests.append(_close_part(writer, digest_of_part))
            writer = None
        if not part_digests:
            seen = f" ({text})" if (text := what_else()) else ""
            raise DataError(f"no sample found in any of the {len(table['path'])} shards of {root}{seen}")
        parts = [content_of(_part_path(partial, part)) for part in range(len(part_digests))]
        meta = {
            "format_version": FORMAT_VERSION,
            "classes": classes,
            "fingerprint": whole.hexdigest()[:32],
            "fingerprint_of_places": places.hexdigest()[:32],
            "image_size": image_size,
            "form": form,
            "label_field": label_field,
            "image_field": image_field,
            "origin": origin() if origin else [],
            "part_digests": part_digests,
            "part_bytes": [content.file_bytes for content in parts],
            "part_checksums": [content.checksum for content in parts],
        }
        shard_schema = pa.schema(list(SHARD_FIELDS.items())).with_metadata(
            {META_KEY: json.dumps(sealed(meta)).encode()}
        )
        pq.write_table(pa.table(table, schema=shard_schema), partial / "shards.parquet", write_page_checksum=True)
        replace_dir(partial, root / "index")
    finally:
        if writer is not None:
            writer.close()
        shutil.rmtree(partial, ignore_errors=True)


def _sample_schema(image_size: tuple[int, int] | None) -> Any:
    import pyarrow as pa

    fields = [
        ("shard", pa.int32()), ("key", pa.string()), ("offset", pa.int64()), ("size", pa.int64()),
        ("ext", pa.dictionary(pa.int32(), pa.string())), ("label", pa.int64()),
        ("width", pa.int32()), ("height", pa.int32()),
    ]  # fmt: skip
    return pa.schema(fields)


def _extensions(values: list[str]) -> Any:
    import pyarrow as pa

    names = list(dict.fromkeys(values))
    if len(names) == 1:
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(values), dtype=np.int32)), pa.array(names))
    return pa.array(values, pa.string()).dictionary_encode()


def _side(lengths: int | list[int | None] | None, rows: int) -> Any:
    """A column of widths or heights in pixels: one for all, one each, or nulls where they are not known."""
    import pyarrow as pa

    if isinstance(lengths, int):
        return pa.array(np.full(rows, lengths, dtype=np.int32))
    return pa.nulls(rows, pa.int32()) if lengths is None else pa.array(lengths, pa.int32())


def _part_path(folder: Path, part: int) -> Path:
    return folder / f"samples-{part:05d}.parquet"


def _close_part(writer: Any, digest: Any) -> str:
    text = digest.hexdigest()[:32]
    writer.add_key_value_metadata({PART_KEY: text.encode()})
    writer.close()
    return str(text)


def _digest(name: str, file_bytes: int, samples: Samples) -> str:
    """Names, places, sizes and labels of a shard's samples; its content comes to that by its checksum."""
    parts = hashlib.sha256(f"{name}\0{file_bytes}\0".encode())
    parts.update("\0".join(samples.keys).encode())
    labels = [NO_LABEL if label is None else label for label in samples.labels]
    parts.update(np.array([samples.offsets, samples.sizes, labels], dtype="<i8").tobytes())
    return parts.hexdigest()[:32]
