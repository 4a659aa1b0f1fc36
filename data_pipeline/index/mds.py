"""MDS shards (`mosaicml-streaming`), version 2: where the image and the label of every sample lie.

An MDS shard is a table of offsets, a JSON header, and samples that each begin with the sizes of their variable columns.
So one pass over it gives the same index rows as a tar does, and with them everything else: the exact order, resume at
any position, any number of ranks and workers. `streaming` itself is only needed to write (`write_mds`); nothing here
uses shared memory or barriers.

What cannot be read by offset is refused by name: compressed shards, and columns that do not hold the bytes of an image file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.labels import check_label, parse_label
from tarflow.data_pipeline.index.samples import Rules, Samples
from tarflow.errors import why
from tarflow.records import parse_object, read_bounded

INDEX_FILE = "index.json"
_MAX_BYTES = 256 << 20  # of it: some hundred thousand shards
_MAX_COLUMNS = 1000
_WAY_OUT = "write the set again, or restore its index.json"
_INTEGERS = {"int": "<i8", **{f"{sign}int{bits}": f"<{'u' if sign else 'i'}{bits // 8}"
                              for sign in ("", "u") for bits in (8, 16, 32, 64)}}  # fmt: skip
_KEY_COLUMNS = ("__key__", "key")

Bytes = NDArray[np.uint8]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class _Role:
    """What a column is looked for as: by which names, if nobody gave one, and in which encodings."""

    what: str
    flag: str  # that names the column
    names: tuple[str, ...]
    encodings: tuple[str, ...]
    required: bool = False  # then any column of a right encoding will do


_IMAGE = _Role(
    "the bytes of an image file", "--image-field", ("image", "img", "jpg", "jpeg", "png", "webp", "x"),
    ("bytes", "jpeg", "png"), required=True,
)  # fmt: skip
_LABEL = _Role(
    "labels", "--label-field", ("label", "cls", "class", "target", "y"), (*_INTEGERS, "str", "str_int", "bytes")
)


class _File(BaseModel):
    """A file in an `index.json` by `streaming`; its other fields do not matter here."""

    model_config = ConfigDict(strict=True)

    basename: str = Field(pattern=r"^[^/\\\x00-\x1f]{1,255}$")
    bytes: int = Field(ge=0, lt=1 << 48)


class _Entry(BaseModel):
    """A shard in an `index.json`."""

    model_config = ConfigDict(strict=True)

    format: str
    version: int
    compression: str | None = None
    raw_data: _File
    samples: int = Field(ge=0, lt=1 << 30)
    column_names: list[str] = Field(max_length=_MAX_COLUMNS)
    column_encodings: list[str] = Field(max_length=_MAX_COLUMNS)
    column_sizes: list[Annotated[int, Field(ge=0, lt=1 << 31)] | None] = Field(max_length=_MAX_COLUMNS)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names, encodings, sizes = self.column_names, self.column_encodings, self.column_sizes
        if not len(names) == len(encodings) == len(sizes):
            raise ValueError(f"{len(names)} columns have {len(encodings)} encodings and {len(sizes)} sizes")
        for name, encoding, size in zip(names, encodings, sizes):
            kind = _INTEGERS.get(encoding)
            if kind and size != np.dtype(kind).itemsize:
                raise ValueError(f"column {name!r} holds {encoding} in {size} bytes")
        if self.raw_data.basename in (".", ".."):
            raise ValueError("raw_data.basename is not the name of a file")
        return self


class _Listed(BaseModel):
    """An `index.json`."""

    shards: list[_Entry]


@dataclass(frozen=True)
class MdsShard:
    """One shard of an `index.json`. `sizes[i]`: bytes of column i, None where each sample stores its own."""

    path: Path
    file_bytes: int
    samples: int
    names: list[str]
    encodings: list[str]
    sizes: list[int | None]


def mds_shards(folder: Path) -> list[MdsShard]:
    """The shards that `folder/index.json` lists. Raises DataError for what is not an MDS set or cannot be read by offset."""
    path = folder / INDEX_FILE
    try:
        listed = _Listed.model_validate(parse_object(read_bounded(path, _MAX_BYTES)))
    except ValidationError as err:
        first = err.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"cannot read {path} as the index of an MDS set: {where}: {first['msg']}; {_WAY_OUT}") from None
    except (OSError, ValueError) as err:
        raise DataError(f"cannot read {path} as the index of an MDS set: {err}; {_WAY_OUT}") from None
    if not listed.shards:
        raise DataError(f"{path} lists no shards")
    return [_shard(folder, entry) for entry in listed.shards]


def _shard(folder: Path, entry: _Entry) -> MdsShard:
    path = folder / entry.raw_data.basename
    if entry.format != "mds" or entry.version != 2:
        raise DataError(f"shard {path} is {entry.format!r} version {entry.version}, only mds version 2 can be read")
    if entry.compression and not path.is_file():
        raise DataError(
            f"shard {path} is compressed ({entry.compression}): reading by offset needs plain shards; "
            "decompress them, or write the set without compression"
        )
    return MdsShard(
        path, entry.raw_data.bytes, entry.samples, entry.column_names, entry.column_encodings, entry.column_sizes
    )


def scan_mds(shard: MdsShard, first: int, rules: Rules) -> Samples:
    """The samples of one shard; `first` is the number of its first sample in the set, the key of those without one.

    Strict: DataError at the first problem; else a damaged shard has no samples, malformed labels are left out, and both are
    counted. Raises DataError in any case for a set without a column of images.
    """

    def where(row: int) -> str:
        return f"shard {shard.path}, sample {first + row}"

    out = Samples()
    image = _pick(shard, rules.image_field, _IMAGE)
    assert image is not None
    label = _pick(shard, rules.label_field, _LABEL)
    key = next((shard.names.index(name) for name in _KEY_COLUMNS if name in shard.names), None)
    try:
        data, starts, sizes = _table(shard)
    except (OSError, ValueError) as err:
        out.problem("damaged_shard", f"shard {shard.path}: damaged: {why(err)}", rules.strict)
        return out
    labels = None if label is None else _values(shard, label, data, starts, sizes)
    out.label_from = "" if label is None else shard.names[label]
    out.fields = Counter(dict.fromkeys(shard.names, shard.samples))
    numbers = {name: number for number, name in enumerate(rules.classes or [])}
    for row in range(shard.samples):
        value = None
        if labels is not None:
            try:
                value = _label(labels[row], numbers)
            except ValueError as err:
                out.problem("malformed_label", f"{where(row)}, column {out.label_from!r}: {err}", rules.strict)
                continue
        if sizes[image][row] == 0:
            out.problem("empty_image", f"{where(row)}: the image has 0 bytes", rules.strict)
            continue
        name = f"{first + row:08d}" if key is None else _text(data, starts[key], sizes[key], row)
        out.add(name, int(starts[image][row]), int(sizes[image][row]), shard.names[image], value)
    return out


def _table(shard: MdsShard) -> tuple[Bytes, list[Int64s], list[Int64s]]:
    """(file as uint8, per column its starts, per column its sizes), int64 [samples]. Raises ValueError if damaged."""
    if shard.samples == 0:
        _check_size(shard)
        empty = [np.zeros(0, dtype=np.int64) for _ in shard.names]
        return np.zeros(0, dtype=np.uint8), empty, empty
    data, begins, ends = _samples(shard)
    # A sample begins with the sizes of its columns of variable size; then come the columns in order.
    variable = sum(size is None for size in shard.sizes)
    if (ends - begins < 4 * variable).any() or ends[-1] > len(data) or begins[0] < 4 * (shard.samples + 2):
        raise ValueError("its offsets run backwards or beyond its end")
    starts, sizes = [], []
    at, size_at = begins + 4 * variable, begins
    for fixed in shard.sizes:
        if fixed is None:
            size = _gather(data, size_at, 4).view("<u4").ravel().astype(np.int64)
            size_at = size_at + 4
        else:
            size = np.full(shard.samples, fixed, dtype=np.int64)
        starts.append(at)
        sizes.append(size)
        at = at + size
    if (at != ends).any():
        row = int(np.flatnonzero(at != ends)[0])
        raise ValueError(f"sample {row} has columns of {at[row] - begins[row]} bytes in {ends[row] - begins[row]}")
    return data, starts, sizes


def _check_size(shard: MdsShard) -> None:
    have = shard.path.stat().st_size
    if have != shard.file_bytes:
        raise ValueError(f"it has {have} bytes, {INDEX_FILE} says {shard.file_bytes}")


def _samples(shard: MdsShard) -> tuple[Bytes, Int64s, Int64s]:
    """(file as uint8, where each sample begins, where it ends). Raises ValueError if the header does not fit."""
    _check_size(shard)
    head_bytes = 4 * (shard.samples + 2)
    if head_bytes > shard.file_bytes:
        raise ValueError(
            f"{INDEX_FILE} says that it holds {shard.samples} samples, which do not fit into its {shard.file_bytes} bytes"
        )
    data: Bytes = np.memmap(shard.path, dtype=np.uint8, mode="r")
    head = np.frombuffer(data[:head_bytes], dtype="<u4").astype(np.int64)
    if head.size < shard.samples + 2 or head[0] != shard.samples:
        raise ValueError(f"its header does not hold {shard.samples} samples, as {INDEX_FILE} says")
    return data, head[1:-1], head[2:]


def _gather(data: Bytes, at: Int64s, size: int) -> Bytes:
    """uint8 [n, size]: `size` bytes from each position."""
    return np.ascontiguousarray(data[at[:, None] + np.arange(size)])


def _values(
    shard: MdsShard, column: int, data: Bytes, starts: list[Int64s], sizes: list[Int64s]
) -> list[int] | list[bytes]:
    """The values of a column of labels."""
    if shard.samples == 0:
        return []
    kind = _INTEGERS.get(shard.encodings[column])
    if kind:
        numbers: list[int] = _gather(data, starts[column], np.dtype(kind).itemsize).view(kind).ravel().tolist()
        return numbers
    return [data[at : at + size].tobytes() for at, size in zip(starts[column].tolist(), sizes[column].tolist())]


def _label(value: int | bytes, numbers: dict[str, int]) -> int:
    return check_label(value) if isinstance(value, int) else parse_label(value, numbers)


def _text(data: Bytes, starts: Int64s, sizes: Int64s, row: int) -> str:
    return data[starts[row] : starts[row] + sizes[row]].tobytes().decode("utf-8", errors="backslashreplace")


def _pick(shard: MdsShard, asked: str | None, role: _Role) -> int | None:
    """The column asked for, or of a known name; for a required one else the first of a right encoding."""
    columns = ", ".join(f"{name} ({encoding})" for name, encoding in zip(shard.names, shard.encodings))
    if asked is not None and asked not in shard.names:
        raise DataError(f"shard {shard.path} has no column {asked!r} ({role.flag}); it has {columns}")
    found = [name for name in ((asked,) if asked else role.names) if name in shard.names]
    if not found and role.required:
        found = [name for name, encoding in zip(shard.names, shard.encodings) if encoding in role.encodings]
        if not found:
            raise DataError(f"shard {shard.path} has no column that holds {role.what}; it has {columns}")
    if not found:
        return None
    column = shard.names.index(found[0])
    encoding = shard.encodings[column]
    if encoding.split(":")[0] not in role.encodings:
        raise DataError(
            f"shard {shard.path}: column {found[0]!r} is {encoding}, {role.what} must be one of "
            f"{', '.join(role.encodings)}: write the set again with such a column"
        )
    return column


def write_mds(folder: Path, samples: Iterable[tuple[bytes, int]], shard_bytes: int) -> int:
    """Write (image file, label or -1) as an MDS set with `streaming`; returns how many. Labels go only if all have one.

    Raises DataError where the package is missing.
    """
    try:
        from streaming import MDSWriter  # takes seconds and loads torch: only where it is used
    except ImportError as err:
        raise DataError(
            f"writing MDS needs the package mosaicml-streaming ({err}): pip install 'tarflow[mds]'"
        ) from None
    stream = iter(samples)
    head = next(stream, None)
    if head is None:
        return 0
    labelled = head[1] >= 0
    columns = {"image": "bytes", "label": "int"} if labelled else {"image": "bytes"}
    count = 0
    with MDSWriter(out=str(folder), columns=columns, size_limit=shard_bytes, exist_ok=True) as writer:
        for image, label in chain([head], stream):
            if (label >= 0) != labelled:
                raise DataError("some images have labels and some have none: MDS columns hold all or none of them")
            writer.write({"image": image, "label": label} if labelled else {"image": image})
            count += 1
    return count
