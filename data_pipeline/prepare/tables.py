"""Parquet with image bytes, as `datasets` and others write it: columns, class names and splits found by name."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.index.labels import MAX_CLASSES
from tarflow.data_pipeline.layout.names import class_names, shown
from tarflow.data_pipeline.layout.splits import ALL, by_split, chosen, split_named
from tarflow.data_pipeline.prepare.labels import named_integers, number_labels
from tarflow.data_pipeline.prepare.source import (
    Choices,
    ImageSource,
    asked_name,
    files_note,
    first_of,
    split_note,
    split_numbers,
)  # fmt: skip
from tarflow.errors import why
from tarflow.files import open_to_read

WINDOW_BYTES = 1 << 30  # of row groups that are shuffled together
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "bytes", "image_bytes", "data")
_LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "target", "y")
_LOOKED_AT = 64  # rows, to tell bytes from paths


def parquet_source(files: Sequence[Path], root: Path, choices: Choices | None = None) -> ImageSource:
    """Image bytes in a binary column, or a struct column with a `bytes` field; labels as integers or names.

    Class names come from the schema where `datasets` wrote them (`ClassLabel`); -1 stands for no label there. Splits are
    recognised by the files' names below `root`. Raises DataError for files that do not belong together, and columns
    without images.
    """
    choices = choices or Choices()
    groups = _splits(files, root, choices.split)
    tables = [_Table.open(file) for members in groups.values() for file in members]
    first = tables[0]
    image, label, notes = _columns(first, choices)
    names = first.class_names(label)
    for table in tables:
        table.check_same(first, image, label, names)
    # Labels are read before the images are looked at: what is wrong with them is named first.
    labels, classes, named, note = _labels(tables, label, names, root)
    if len(labels) == 0:
        raise DataError(f"{shown(first.file)} holds no rows")
    for table in tables:
        table.refuse_paths(image)

    if note is None and choices.labels != "none":
        note = f"labels: none (no column of a known name among {', '.join(first.names)})"
    rows_of = {table.file: table.rows for table in tables}
    sizes = {name: sum(rows_of[file] for file in members) for name, members in groups.items()}
    read = files_note([table.file for table in tables], root)
    notes = [read, *split_note("file name", sizes), f"images: column {image!r}", *notes, *([note] if note else [])]
    reader = _Reader(tables, image)
    return ImageSource(
        labels, classes, reader.read, reader.name,
        runs=reader.runs, named=named, splits=split_numbers(sizes, choices), notes=notes,
    )  # fmt: skip


def _labels(
    tables: list[_Table], label: str | None, names: list[str] | None, root: Path
) -> tuple[NDArray[np.int64], list[str] | None, bool, str | None]:
    """(labels of all rows, classes, whether the classes have names of their own, a note; None without a label column)."""
    nothing = np.full(sum(table.rows for table in tables), -1, dtype=np.int64)
    if label is None:
        return nothing, None, False, None
    columns = [f"column {label!r} of {shown(table.file)}" for table in tables]
    if names:
        parts = [named_integers(table.values(label), names, where) for table, where in zip(tables, columns)]
        note = f"labels: column {label!r}, names from the schema (ClassLabel)"
        return np.concatenate(parts), class_names(names, columns[0]), True, note
    values: list[Any] = []
    for table, where in zip(tables, columns):
        part = table.values(label)
        number_labels(part, where)  # each file by itself first: an error then names the file and its row
        values += part
    if all(value is None for value in values):
        return nothing, None, False, f"labels: none (column {label!r} is empty)"
    labels, classes, named = number_labels(values, f"column {label!r} of {shown(root)}")
    return labels, classes, named, f"labels: column {label!r}, {'names in it' if named else 'integers'}"


def _splits(files: Sequence[Path], root: Path, asked: str | None) -> dict[str, list[Path]]:
    """Split -> its files, '' where the files are one set. Raises DataError for files of several data sets."""
    groups = by_split(sorted(files), root)
    wanted = chosen([*groups], asked, shown(root))
    groups = {"": sorted(files)} if wanted == [ALL] else {name: groups[name] for name in wanted}
    sets = {
        tuple(part for part in file.relative_to(root).parts[:-1] if split_named(part) is None)
        for members in groups.values()
        for file in members
        if file.is_relative_to(root)
    }
    if len(sets) > 1 and asked != ALL:
        listed = ", ".join(sorted(shown("/".join(parts) or ".") for parts in sets)[:8])
        raise DataError(
            f"{shown(root)} holds Parquet files in the folders {listed}: name one of them, or take all as one set with "
            f"--split {ALL}"
        )
    return groups


@dataclass(frozen=True)
class _Table:
    """An open Parquet file."""

    file: Path
    handle: Any  # pyarrow.parquet.ParquetFile

    @classmethod
    def open(cls, file: Path) -> _Table:
        """Open the file. Raises DataError for one that cannot be read or holds fewer rows than it promises."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            handle = pq.ParquetFile(open_to_read(file), page_checksum_verification=True)
            size = file.stat().st_size
        except (OSError, ValueError, MemoryError, pa.ArrowException) as err:  # ValueError: a path that is not UTF-8
            raise DataError(f"cannot read {shown(file)} as Parquet: {why(err)}") from None
        groups = [handle.metadata.row_group(group).num_rows for group in range(handle.num_row_groups)]
        if sum(groups) != handle.metadata.num_rows or min(groups, default=0) < 0:
            raise DataError(
                f"{shown(file)} is damaged: it promises {handle.metadata.num_rows} rows, its groups {sum(groups)}"
            )
        if sum(groups) > size:  # an image takes at least a byte
            raise DataError(
                f"{shown(file)} promises {sum(groups):,} rows in {size:,} bytes: that many images cannot be in it"
            )
        return cls(file, handle)

    @property
    def rows(self) -> int:
        return int(self.handle.metadata.num_rows)

    @property
    def names(self) -> list[str]:
        """Its columns."""
        return list(self.handle.schema_arrow.names)

    def column(self, name: str, group: int | None = None) -> Any:
        """A column, or that of one group of rows, as pyarrow has it. Raises DataError where it is damaged."""
        import pyarrow as pa

        handle = self.handle
        try:
            if group is None:
                found, rows = handle.read(columns=[name])[name], self.rows
            else:
                found = handle.read_row_group(group, columns=[name])[name]
                rows = handle.metadata.row_group(group).num_rows
        except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as err:
            raise DataError(f"cannot read column {name!r} of {shown(self.file)}: {err}") from None
        if len(found) != rows:
            raise DataError(f"cannot read column {name!r} of {shown(self.file)}: {len(found)} of {rows} rows are there")
        return found

    def values(self, name: str, group: int | None = None, most: int | None = None) -> list[Any]:
        """The values of a column, or the first `most` of them. Raises DataError."""
        column = self.column(name, group).slice(0, most)
        try:
            return list(column.to_pylist())
        except ValueError as err:  # a string that is not UTF-8
            raise DataError(f"cannot read column {name!r} of {shown(self.file)}: {err}") from None

    @cached_property
    def features(self) -> dict[str, Any]:
        """The features that `datasets` wrote into the schema, by column; empty where there are none."""
        try:
            features = json.loads(self.handle.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        except (KeyError, TypeError, ValueError, RecursionError):
            return {}
        return features if isinstance(features, dict) else {}

    def columns_of(self, kind: str) -> list[str]:
        """The columns that are a feature of this kind, `Image` or `ClassLabel`."""
        return [name for name, feature in self.features.items()
                if isinstance(feature, dict) and feature.get("_type") == kind and name in self.names]  # fmt: skip

    def class_names(self, label: str | None) -> list[str] | None:
        """The class names of a label column, where the schema has them."""
        if label not in self.columns_of("ClassLabel"):
            return None
        names = self.features[label].get("names")
        if isinstance(names, dict | list) and len(names) > MAX_CLASSES:
            raise DataError(f"the schema names {len(names):,} classes, at most {MAX_CLASSES:,} are possible")
        if isinstance(names, dict):  # {"0": "cat", ...}, as cards have it
            names = [names.get(str(number)) for number in range(len(names))]
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None

    def check_same(self, first: _Table, image: str, label: str | None, names: list[str] | None) -> None:
        """Raise DataError where this file has other columns or class names than the first one."""
        for column in (image, label):
            if column is not None and column not in self.names:
                raise DataError(
                    f"{shown(self.file)} has no column {column!r}, {shown(first.file)} has: name the files of one set"
                )
        kind = self.handle.schema_arrow.field(image).type
        if not _holds_bytes(kind):
            raise DataError(f"column {image!r} of {shown(self.file)} is {kind}, in {shown(first.file)} it holds bytes")
        if self.class_names(label) != names:
            raise DataError(
                f"the class names of {label!r} in {shown(self.file)} are not those in {shown(first.file)}: "
                "name the files of one set"
            )

    def refuse_paths(self, image: str) -> None:
        """Raise DataError where the image column holds paths without bytes: not one image could be read."""
        import pyarrow as pa

        if not self.handle.num_row_groups or not pa.types.is_struct(self.handle.schema_arrow.field(image).type):
            return
        values = [value for value in self.values(image, 0, _LOOKED_AT) if value]
        if values and not any(value.get("bytes") for value in values):
            path = next((value["path"] for value in values if value.get("path")), None)
            raise DataError(
                f"column {image!r} of {shown(self.file)} holds paths such as {path!r} and no bytes: write the images into the "
                "Parquet file (`embed_external_files` of datasets), or prepare the folder that holds them"
            )


def _columns(table: _Table, choices: Choices) -> tuple[str, str | None, list[str]]:
    """(image column, label column or None, notes)."""
    images = table.columns_of("Image")
    image = asked_name("column", choices.image_column, table.names, table.file, "--image-column")
    image = image or first_of(_IMAGE_COLUMNS, images or table.names) or (images[0] if len(images) == 1 else None)
    if image is None:
        raise DataError(
            f"cannot tell which column of {shown(table.file)} holds the images: name it with --image-column "
            f"({', '.join(table.names)})"
        )
    label, notes = (None, []) if choices.labels == "none" else _label_column(table, choices)
    kind = table.handle.schema_arrow.field(image).type
    if not _holds_bytes(kind):
        raise DataError(
            f"column {image!r} of {shown(table.file)} is {kind}, expected image bytes (--image-column): text may be paths, "
            "which are not followed"
        )
    return image, label, notes


def _label_column(table: _Table, choices: Choices) -> tuple[str | None, list[str]]:
    """(label column or None, a note about others that may be meant)."""
    typed = table.columns_of("ClassLabel")
    label = asked_name("column", choices.label_column, table.names, table.file, "--label-column")
    label = label or first_of(_LABEL_COLUMNS, typed or table.names) or (typed[0] if len(typed) == 1 else None)
    if label is None and typed:
        raise DataError(
            f"cannot tell which column of {shown(table.file)} holds the labels: name it with --label-column "
            f"({', '.join(typed)})"
        )
    possible = typed or [name for name in table.names if name in _LABEL_COLUMNS]
    others = [name for name in possible if name != label]
    if label and others and choices.label_column is None:
        return label, [f"other columns that may hold labels (--label-column): {', '.join(others)}"]
    return label, []


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


class _Reader:
    """Reads single images out of the row groups of several files, and keeps the groups that were read last.

    `runs`: (rows, bytes) of every row group, in order.
    """

    def __init__(self, tables: Sequence[_Table], image: str) -> None:
        self.image = image
        self.groups = [(table, group) for table in tables for group in range(table.handle.num_row_groups)]
        infos = [table.handle.metadata.row_group(group) for table, group in self.groups]
        self.runs: list[tuple[int, int]] = [(info.num_rows, info.total_byte_size) for info in infos]
        self.starts = np.concatenate([[0], np.cumsum([rows for rows, _ in self.runs])]).astype(np.int64)
        self.rows = int(self.starts[-1])
        self._cache: dict[int, Any] = {}
        self._lock = threading.Lock()

    def read(self, i: int) -> bytes:
        """The bytes of an image. Raises BadSampleError."""
        group, row = self._locate(i)
        column = self._column(group)
        try:
            value = column[row].as_py()
        except ValueError as err:
            raise BadSampleError("unreadable", str(err)) from None
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            path = value.get("path") if isinstance(value, dict) else None
            raise BadSampleError("no_bytes", "no image bytes" + (f", only the path {path!r}" if path else ""))
        return bytes(data)

    def name(self, i: int) -> str:
        """`FILE row N`, for messages."""
        group, row = self._locate(i)
        table, number = self.groups[group]
        return f"{shown(table.file)} row {int(self.starts[group] - self.starts[group - number]) + row}"

    def _locate(self, i: int) -> tuple[int, int]:
        """(row group, row in it) of an image."""
        group = int(np.searchsorted(self.starts, i, side="right")) - 1
        return group, i - int(self.starts[group])

    def _column(self, group: int) -> Any:
        """The images of a row group; called from several threads."""
        with self._lock:
            if group not in self._cache:
                # The shuffle works through windows of WINDOW_BYTES, so this much is asked for again and again.
                while self._cache and sum(self.runs[kept][1] for kept in self._cache) > 2 * WINDOW_BYTES:
                    self._cache.pop(next(iter(self._cache)))
                table, number = self.groups[group]
                try:
                    self._cache[group] = table.column(self.image, number)
                except DataError as err:
                    raise BadSampleError("unreadable", str(err)) from None
            return self._cache[group]
