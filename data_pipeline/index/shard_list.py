"""The list of shards of an index, `shards.parquet`: read within bounds, and checked before it is used.

Its metadata is sealed like our other small files: `checksum` is the CRC-32 of all its other fields. Lists of earlier versions
carry none; their fields are checked all the same. No pydantic here: worker processes open the index, too, and must start fast.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.images.crop import FIXED
from tarflow.data_pipeline.index.labels import MAX_CLASSES

META_KEY = b"tarflow.index"
NO_LABEL = np.iinfo(np.int64).min  # in `Rows.labels`; distinct from every label that data can hold
SHARD_FIELDS = {
    "path": "string", "samples": "int64", "bytes": "int64", "part": "int32", "row_group": "int32",
    "labelled": "int64", "label_min": "int64", "label_max": "int64", "digest": "string",
    "modified_ns": "int64", "checksum": "string", "sketch": "string",
}  # fmt: skip
CONTENT_FIELDS = ("modified_ns", "checksum", "sketch")  # not in indexes of version 0.1
MAX_BYTES = 256 << 20  # of the file: a million shards and their paths
_MAX_SHARDS = 4_000_000
_MAX_TEXT = 1 << 30  # bytes of a column, unpacked
_MAX_PATH = 4096  # characters, of other strings as well
_MAX_SAMPLES = 1 << 48
_HEX32 = re.compile(r"[0-9a-f]{32}")


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """The metadata with the checksum of its fields."""
    return {**meta, "checksum": _seal(meta)}


def _seal(meta: dict[str, Any]) -> str:
    text = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"


def read_list(source: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, column -> NumPy array of numbers or list of strings) of a list at a path or in an open file.

    Missing labels are NO_LABEL. Raises ValueError for damage, KeyError for a Parquet file that is not a list of
    shards, OSError.
    """
    import pyarrow.parquet as pq

    about = pq.read_metadata(source)
    schema = about.schema.to_arrow_schema()
    if not 0 < about.num_rows <= _MAX_SHARDS:
        raise ValueError(f"it lists {about.num_rows} shards")
    meta = _meta((schema.metadata or {})[META_KEY])
    have = [name for name in SHARD_FIELDS if name in schema.names]
    if [name for name in SHARD_FIELDS if name not in have] not in ([], list(CONTENT_FIELDS)):
        raise ValueError(f"it has the columns {', '.join(schema.names)[:300]}")
    for name in have:
        if str(schema.field(name).type) != SHARD_FIELDS[name]:
            raise ValueError(f"column {name!r} is {schema.field(name).type}, expected {SHARD_FIELDS[name]}")
    # As dictionaries, strings stay as small as in the file until their lengths are known.
    texts = [name for name in have if SHARD_FIELDS[name] == "string"]
    with pq.ParquetFile(source, metadata=about, read_dictionary=texts, page_checksum_verification=True) as file:
        table = file.read(columns=have, use_threads=False)
    columns: dict[str, Any] = {}
    for name in have:
        column = table[name]
        if SHARD_FIELDS[name] == "string":
            columns[name] = _texts(name, column)
            continue
        if name in ("label_min", "label_max"):
            column = column.fill_null(NO_LABEL)
        if column.null_count:
            raise ValueError(f"column {name!r} has nulls")
        columns[name] = column.to_numpy()
    _check(columns, len(meta["part_digests"]))
    return meta, columns


def _texts(name: str, column: Any) -> list[str]:
    import pyarrow.compute as pc

    if column.null_count:
        raise ValueError(f"column {name!r} has nulls")
    longest = max((pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0 for chunk in column.chunks), default=0)
    if longest > 4 * _MAX_PATH or longest * len(column) > _MAX_TEXT:
        raise ValueError(f"column {name!r} holds strings of {longest} bytes")
    values: list[str] = column.to_pylist()
    return values


def _meta(text: bytes) -> dict[str, Any]:
    """The metadata without its checksum, which must match if there is one."""
    try:
        meta = json.loads(text)
    except RecursionError:
        raise ValueError("its metadata is nested too deeply") from None
    if not isinstance(meta, dict):
        raise ValueError("its metadata is not a JSON object")
    seal = meta.pop("checksum", None)
    if seal is not None and seal != _seal(meta):
        raise ValueError("the checksum of its metadata does not match")
    if meta.get("format_version") != 1:  # another version may have other fields; `Index` refuses it by its number
        return {"part_digests": [], **meta}
    for name, right in _META.items():
        if not right(meta.get(name)):
            raise ValueError(f"{name!r} in its metadata is {str(meta.get(name))[:80]!r}")
    parts = meta["part_digests"]
    if any(len(meta[name]) != len(parts) for name in ("part_bytes", "part_checksums") if meta.get(name) is not None):
        raise ValueError("its metadata lists different numbers of parts")
    return meta


def _text(longest: int) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, str) and len(value) <= longest)


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _each(right: Callable[[Any], bool], most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(right, value))


def _hex(value: Any) -> bool:
    return isinstance(value, str) and bool(_HEX32.fullmatch(value))


_META: dict[str, Callable[[Any], bool]] = {
    "classes": lambda value: (
        value is None or _each(lambda name: isinstance(name, str) and len(name) <= _MAX_PATH, MAX_CLASSES)(value)
    ),
    "fingerprint": _hex,
    "fingerprint_of_places": lambda value: value is None or _hex(value),
    "image_size": lambda value: (
        value is None or (_each(lambda side: _whole(side, 1, 1 << 20), 2)(value) and len(value) == 2)
    ),
    "crop": lambda value: value is None or value in FIXED,
    "form": lambda value: value in (None, "tar", "mds"),
    "label_field": _text(_MAX_PATH),
    "image_field": _text(_MAX_PATH),
    "origin": lambda value: value is None or _each(lambda line: isinstance(line, str), 10_000)(value),
    "part_digests": _each(_hex, _MAX_SHARDS),
    "part_bytes": lambda value: value is None or _each(lambda size: _whole(size, 1, 1 << 40), _MAX_SHARDS)(value),
    "part_checksums": lambda value: value is None or _each(lambda text: isinstance(text, str), _MAX_SHARDS)(value),
}


def _check(columns: dict[str, Any], parts: int) -> None:
    """Raise ValueError for the first shard with an impossible value."""
    samples, size, part = columns["samples"], columns["bytes"], columns["part"]
    least, largest, labelled = columns["label_min"], columns["label_max"], columns["labelled"]
    full = samples > 0  # a shard without samples has no row group
    rules: Sequence[tuple[str, NDArray[np.bool_]]] = (
        ("samples", (samples >= 0) & (samples <= _MAX_SAMPLES // len(samples))),
        ("bytes", (size >= samples) & (size < 1 << 62)),  # a sample takes at least one byte
        ("part", (part < parts) & ((part >= 0) == full)),
        ("row_group", (columns["row_group"] >= 0) == full),
        ("labelled", (labelled >= 0) & (labelled <= samples)),
        ("label_min", ((least == NO_LABEL) == (labelled == 0)) & (least <= largest)),
        ("label_max", (largest == NO_LABEL) == (labelled == 0)),
    )
    for name, right in rules:
        if not right.all():
            shard = int(np.argmin(right))
            raise ValueError(f"{name!r} of shard {shard} is {columns[name][shard]}")
    # Strings one by one: there are few shards, and the first wrong one is named.
    texts: Sequence[tuple[str, Callable[[str], Any]]] = (
        ("path", lambda path: path and "\0" not in path),
        ("digest", _HEX32.fullmatch),
        ("checksum", re.compile(r"([0-9a-f]{8})?").fullmatch),
        ("sketch", re.compile(r"([0-9a-f]{32})?").fullmatch),
    )
    for name, fits in texts:
        wrong = next((shard for shard, text in enumerate(columns.get(name, ())) if not fits(text)), None)
        if wrong is not None:
            raise ValueError(f"{name!r} of shard {wrong} is {columns[name][wrong][:80]!r}")
