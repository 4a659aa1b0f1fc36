"""Parquet with image bytes, as `datasets` and others write it: columns, class names and splits found by name."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

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

WINDOW_BYTES = 1 << 30
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "bytes", "image_bytes", "data")
_LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "target", "y")


def parquet_source(files: Sequence[Path], root: Path, choices: Choices | None = None) -> ImageSource:
    """Image bytes in a binary column, or a struct column with a `bytes` field; labels as integers or names.

    Class names come from the schema where `datasets` wrote them (`ClassLabel`); -1 is no label there. Splits are told by
    the files' names below `root`. Raises DataError for files that do not belong together, and columns that hold no images.
    """
    choices = choices or Choices()
    groups = _splits(files, root, choices.split)
    taken = [file for members in groups.values() for file in members]
    handles = [_open(file) for file in taken]
    image, label, notes = _columns(handles[0], taken[0], choices)
    names = _class_names(handles[0], label)
    for handle, file in zip(handles, taken):
        _check_same(handle, file, image, label, names, taken[0])
    runs: list[tuple[int, int]] = []
    places: list[tuple[Any, int, Path]] = []
    found: list[Any] = []
    numbers: list[np.ndarray] = []
    rows_of: dict[Path, int] = {}
    for handle, file in zip(handles, taken):
        rows_of[file] = handle.metadata.num_rows
        for group in range(handle.num_row_groups):
            info = handle.metadata.row_group(group)
            runs.append((info.num_rows, info.total_byte_size))
            places.append((handle, group, file))
        if label:
            values = _plain(_values(handle, file, label), file, label)
            where = f"column {label!r} of {shown(file)}"
            if names:
                numbers.append(named_integers(values, names, where))
            else:
                number_labels(values, where)  # what is wrong is named with its own file and row
                found += values
    total = sum(rows_of.values())
    if total == 0:
        raise DataError(f"{shown(taken[0])} holds no rows")
    _refuse_paths(handles, taken, image)
    labels, classes, named = np.full(total, -1, dtype=np.int64), None, False
    if label and names:
        labels, classes, named = (
            np.concatenate(numbers),
            class_names(names, f"column {label!r} of {shown(taken[0])}"),
            True,
        )
        notes.append(f"labels: column {label!r}, names from the schema (ClassLabel)")
    elif label and any(value is not None for value in found):
        labels, classes, named = number_labels(found, f"column {label!r} of {shown(root)}")
        notes.append(f"labels: column {label!r}, {'names in it' if named else 'integers'}")
    elif label:
        notes.append(f"labels: none (column {label!r} is empty)")
    elif choices.labels != "none":
        notes.append(f"labels: none (no column of a known name among {', '.join(handles[0].schema_arrow.names)})")
    sizes = {name: sum(rows_of[file] for file in members) for name, members in groups.items()}
    notes = [files_note(taken, root), *split_note("file name", sizes), f"images: column {image!r}", *notes]
    read, name = _reader(runs, places, image)
    return ImageSource(
        labels, classes, read, name, runs=runs, named=named, splits=split_numbers(sizes, choices), notes=notes
    )  # fmt: skip


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


def _open(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        handle = pq.ParquetFile(file, page_checksum_verification=True)
        size = file.stat().st_size
    except (OSError, ValueError, MemoryError, pa.ArrowException) as err:  # ValueError: a path that is not UTF-8
        raise DataError(f"cannot read {shown(file)} as Parquet: {err}") from None
    groups = [handle.metadata.row_group(group).num_rows for group in range(handle.num_row_groups)]
    if sum(groups) != handle.metadata.num_rows or min(groups, default=0) < 0:
        raise DataError(
            f"{shown(file)} is damaged: it promises {handle.metadata.num_rows} rows, its groups {sum(groups)}"
        )
    if sum(groups) > size:  # no image takes less than a byte
        raise DataError(
            f"{shown(file)} promises {sum(groups):,} rows in {size:,} bytes: so many images cannot be in it"
        )
    return handle


def _values(handle: Any, file: Path, column: str, group: int | None = None) -> Any:
    """A column of a file, or of a group of its rows. Raises DataError where it is damaged."""
    import pyarrow as pa

    try:
        if group is None:
            found, rows = handle.read(columns=[column])[column], handle.metadata.num_rows
        else:
            found, rows = (
                handle.read_row_group(group, columns=[column])[column],
                handle.metadata.row_group(group).num_rows,
            )
    except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as err:
        raise DataError(f"cannot read column {column!r} of {shown(file)}: {err}") from None
    if len(found) != rows:
        raise DataError(f"cannot read column {column!r} of {shown(file)}: {len(found)} of {rows} rows are there")
    return found


def _plain(values: Any, file: Path, column: str) -> list[Any]:
    try:
        plain: list[Any] = values.to_pylist()
        return plain
    except ValueError as err:  # texts that are not UTF-8
        raise DataError(f"cannot read column {column!r} of {shown(file)}: {err}") from None


def _features(handle: Any) -> dict[str, Any]:
    """The features that `datasets` wrote into the schema, by column; empty where there are none."""
    try:
        features = json.loads(handle.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _typed(handle: Any, kind: str) -> list[str]:
    return [name for name, feature in _features(handle).items()
            if isinstance(feature, dict) and feature.get("_type") == kind and name in handle.schema_arrow.names]  # fmt: skip


def _class_names(handle: Any, label: str | None) -> list[str] | None:
    if label not in _typed(handle, "ClassLabel"):
        return None
    names = _features(handle)[label].get("names")
    if isinstance(names, dict | list) and len(names) > MAX_CLASSES:
        raise DataError(f"the schema names {len(names):,} classes, at most {MAX_CLASSES:,} are possible")
    if isinstance(names, dict):  # {"0": "cat", ...}, as cards have it
        names = [names.get(str(number)) for number in range(len(names))]
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _columns(handle: Any, file: Path, choices: Choices) -> tuple[str, str | None, list[str]]:
    """(image column, label column or None, notes)."""
    names = handle.schema_arrow.names
    images, labels = _typed(handle, "Image"), _typed(handle, "ClassLabel")
    image = asked_name("column", choices.image_column, names, file, "--image-column")
    image = image or first_of(_IMAGE_COLUMNS, images or names) or (images[0] if len(images) == 1 else None)
    if image is None:
        raise DataError(
            f"cannot tell which column of {shown(file)} holds the images: name it with --image-column ({', '.join(names)})"
        )
    notes = []
    label = None
    if choices.labels != "none":
        label = asked_name("column", choices.label_column, names, file, "--label-column")
        label = label or first_of(_LABEL_COLUMNS, labels or names) or (labels[0] if len(labels) == 1 else None)
        if label is None and labels:
            raise DataError(
                f"cannot tell which column of {shown(file)} holds the labels: name it with --label-column ({', '.join(labels)})"
            )
        others = [name for name in (labels or names) if name != label and (labels or name in _LABEL_COLUMNS)]
        if label and others and choices.label_column is None:
            notes.append(f"other columns that may hold labels (--label-column): {', '.join(others)}")
    kind = handle.schema_arrow.field(image).type
    if not _holds_bytes(kind):
        raise DataError(
            f"column {image!r} of {shown(file)} is {kind}, expected image bytes (--image-column): text may be paths, which "
            "are not followed"
        )
    return image, label, notes


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _check_same(handle: Any, file: Path, image: str, label: str | None, names: list[str] | None, first: Path) -> None:
    """Raise DataError where a file has other columns or class names than the first one."""
    schema = handle.schema_arrow
    for column in (image, label):
        if column is not None and column not in schema.names:
            raise DataError(f"{shown(file)} has no column {column!r}, {shown(first)} has: name the files of one set")
    if not _holds_bytes(schema.field(image).type):
        raise DataError(
            f"column {image!r} of {shown(file)} is {schema.field(image).type}, in {shown(first)} it holds bytes"
        )
    if _class_names(handle, label) != names:
        raise DataError(
            f"the class names of {label!r} in {shown(file)} are not those in {shown(first)}: name the files of one set"
        )


def _refuse_paths(handles: list[Any], files: list[Path], image: str) -> None:
    """Raise DataError where the image column holds paths without bytes: not one image could be read."""
    import pyarrow as pa

    for handle, file in zip(handles, files):
        if not handle.num_row_groups or not pa.types.is_struct(handle.schema_arrow.field(image).type):
            continue
        values = _plain(_values(handle, file, image, 0).slice(0, 64), file, image)
        values = [value for value in values if value]
        if values and not any(value.get("bytes") for value in values):
            path = next((value["path"] for value in values if value.get("path")), None)
            raise DataError(
                f"column {image!r} of {shown(file)} holds paths such as {path!r} and no bytes: write the images into the "
                "Parquet file (`embed_external_files` of datasets), or prepare the folder that holds them"
            )


def _reader(runs: list[tuple[int, int]], places: list[tuple[Any, int, Path]], image: str) -> tuple[Any, Any]:
    """(read, name) of an image source."""
    starts = np.concatenate([[0], np.cumsum([rows for rows, _ in runs])])
    cache: dict[int, Any] = {}
    lock = threading.Lock()

    def locate(i: int) -> tuple[int, int]:
        group = int(np.searchsorted(starts, i, side="right")) - 1
        return group, i - int(starts[group])

    def read(i: int) -> bytes:
        group, row = locate(i)
        with lock:  # called from several threads
            if group not in cache:
                # The shuffle works through windows of WINDOW_BYTES, so this much is asked for again and again.
                while cache and sum(runs[kept][1] for kept in cache) > 2 * WINDOW_BYTES:
                    cache.pop(next(iter(cache)))
                handle, number, file = places[group]
                try:
                    cache[group] = _values(handle, file, image, number)
                except DataError as err:
                    raise BadSampleError("unreadable", str(err)) from None
            column = cache[group]
        try:
            value = column[row].as_py()
        except ValueError as err:
            raise BadSampleError("unreadable", str(err)) from None
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            path = value.get("path") if isinstance(value, dict) else None
            raise BadSampleError("no_bytes", "no image bytes" + (f", only the path {path!r}" if path else ""))
        return bytes(data)

    def name(i: int) -> str:
        group, row = locate(i)
        _, _, file = places[group]
        before = next(number for number, place in enumerate(places) if place[2] == file)
        return f"{shown(file)} row {int(starts[group] - starts[before]) + row}"

    return read, name
