"""Indexes that a disk has damaged or a stranger has made: one error, and never other rows than were written."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index import shard_list
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.index.shard_list import META_KEY, sealed


@pytest.fixture
def root(make_set: Callable[..., Path]) -> Path:
    return make_set([5, 0, 4, 3])


def contents(root: Path) -> list[Any]:
    """Everything that goes by an index."""
    index = Index(root)
    found: list[Any] = [index.meta, index.shard_paths, index.shard_bytes.tolist(), index.num_classes, index.image_size]
    for shard in range(len(index.shard_sizes)):
        rows = index.rows(shard)
        keys = index.read(shard, ["key"])["key"].to_pylist()
        found.append(
            (index.shard_content(shard), index.shard_digest(shard), rows.offsets.tolist(), rows.sizes.tolist(),
             rows.labels.tolist(), keys)
        )  # fmt: skip
    return found


@pytest.mark.parametrize("name", ["shards.parquet", "samples-00000.parquet"])
def test_damage_to_an_index_changes_nothing_in_silence(root: Path, name: str) -> None:
    path = root / "index" / name
    whole, expected = path.read_bytes(), contents(root)
    draw = random.Random(name)
    refused: list[str] = []
    for case in range(150):
        damaged = bytearray(whole)
        if case % 3 == 0:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        elif case % 3 == 1:
            at = draw.randrange(len(damaged))
            damaged[at : at + 8] = draw.randbytes(8)
        else:
            del damaged[draw.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            found = contents(root)
        except DataError as error:
            refused.append(str(error))
        else:
            assert found == expected, f"case {case}"
    assert len(refused) > 100
    assert all("tarflow data index" in message for message in refused)


def rewrite(root: Path, change: Callable[[pa.Table], pa.Table] | None = None, seal: bool = True, **meta: Any) -> None:
    """Write the list of shards anew, changed and sealed, as whoever means harm would."""
    path = root / "index" / "shards.parquet"
    table = pq.read_table(path)
    fields = json.loads(table.schema.metadata[META_KEY]) | meta
    del fields["checksum"]
    table = change(table) if change else table
    pq.write_table(
        table.replace_schema_metadata({META_KEY: json.dumps(sealed(fields) if seal else fields).encode()}), path
    )


def column(name: str, values: list[Any]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.column_names.index(name)
        return table.set_column(at, name, pa.array(values, table.schema.field(name).type))

    return change


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("samples", [5, 0, 4, 1 << 40]),
        ("samples", [5, 0, 4, -3]),
        ("samples", [5, 0, 4, 1 << 62]),
        ("samples", [5, 0, 4, None]),
        ("bytes", [10240, 10240, 10240, -1]),
        ("part", [0, -1, 0, 7]),
        ("part", [0, -1, 0, -1]),
        ("row_group", [0, -1, 1, -4]),
        ("row_group", [0, -1, 2, 1]),
        ("row_group", [0, -1, 1, 900]),
        ("labelled", [5, 0, 4, 99]),
        ("label_max", [1, None, 2, 1]),
        ("label_min", [0, None, None, 0]),
        ("path", ["a.tar", "b.tar", "", "d.tar"]),
        ("path", ["a.tar", "b.tar", "c\0.tar", "d.tar"]),
        ("path", ["a.tar", "b.tar", "c" * 20_000, "d.tar"]),
        ("digest", ["x"] * 4),
        ("checksum", ["zz"] * 4),
        ("sketch", ["../../x"] * 4),
    ],
)
@pytest.mark.case("H10")
def test_numbers_that_cannot_be_are_named(root: Path, name: str, values: list[Any]) -> None:
    if name == "label_max":
        values = [2, None, 2, 0]  # not what the rows say
    rewrite(root, column(name, values))
    with pytest.raises(DataError, match=r"cannot read .*; rebuild the index: tarflow data index") as caught:
        contents(root)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "meta",
    [
        {"classes": ["a", 1]},
        {"classes": {"a": 1}},
        {"classes": ["x" * 5000]},
        {"image_size": [8]},
        {"image_size": [8, -8]},
        {"image_size": [1e400, 8]},
        {"image_size": [True, 8]},
        {"form": "zip"},
        {"fingerprint": "../../x"},
        {"fingerprint": 7},
        {"origin": "text"},
        {"part_digests": "text"},
        {"part_digests": []},
        {"part_bytes": [1, 2]},
        {"label_field": 7},
    ],
)
@pytest.mark.case("H10")
def test_fields_that_cannot_be_are_named(root: Path, meta: dict[str, Any]) -> None:
    rewrite(root, **meta)
    with pytest.raises(DataError, match=r"cannot read .*; rebuild the index: tarflow data index"):
        contents(root)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"format_version": 1', b"7", b'{"format_version": 1}', b"\xff", b'{"format_version": 1, "checksum": 7}']
)  # fmt: skip
@pytest.mark.case("H10")
def test_metadata_that_is_none_is_one_error(root: Path, text: bytes) -> None:
    path = root / "index" / "shards.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({META_KEY: text}), path)
    with pytest.raises(DataError, match="rebuild the index"):
        Index(root)


def test_a_changed_name_in_the_metadata_is_noticed_by_its_seal(root: Path) -> None:
    path = root / "index" / "shards.parquet"
    table = pq.read_table(path)
    fields = json.loads(table.schema.metadata[META_KEY]) | {"classes": ["cat", "dog", "cow"]}
    pq.write_table(table.replace_schema_metadata({META_KEY: json.dumps(fields).encode()}), path)
    with pytest.raises(DataError, match="checksum of its metadata does not match"):
        Index(root)
    rewrite(root, seal=False, classes=["cat", "dog", "cow"])  # as versions before the seal wrote it
    assert Index(root).classes == ["cat", "dog", "cow"]


@pytest.mark.case("H10")
def test_a_list_of_a_billion_shards_is_not_unpacked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_list, "_MAX_SHARDS", 30_000)  # as large, a test would be slow
    monkeypatch.setattr(shard_list, "_MAX_TEXT", 10 << 20)
    path = root / "index" / "shards.parquet"
    table = pq.read_table(path).slice(0, 1)
    many = table.take(pa.array(np.zeros(50_000, dtype=np.int64)))
    pq.write_table(many.select(["samples"]).replace_schema_metadata(table.schema.metadata), path)
    assert path.stat().st_size < 1 << 13
    with pytest.raises(DataError, match="it lists 50000 shards"):
        Index(root)
    long = table.set_column(0, "path", pa.array(["x" * 4000])).take(pa.array(np.zeros(3_000, dtype=np.int64)))
    pq.write_table(long, path)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(DataError, match="'path' holds strings of 4000 bytes"):
        Index(root)


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("offset", [512, 1536, 2560, 3584, 1 << 50], "lie outside its"),
        ("offset", [-512, 1536, 2560, 3584, 4608], "lie outside its"),
        ("size", [1 << 62, 1, 1, 1, 1], "lie outside its"),
        ("size", [-1, 1, 1, 1, 1], "lie outside its"),
        ("offset", [None, 1, 1, 1, 1], "lack their place"),
        ("label", [1, 1, 1, 1, 1], "labels are not those"),
        ("shard", [2, 2, 2, 2, 2], "belong to another shard"),
    ],
)
@pytest.mark.case("H10")
def test_rows_that_do_not_fit_their_shard_are_named(root: Path, name: str, values: list[Any], problem: str) -> None:
    path = root / "index" / "samples-00000.parquet"
    table = pq.ParquetFile(path).read_row_group(0)
    digest = pq.ParquetFile(path).metadata.metadata[META_KEY]
    table = column(name, values)(table).replace_schema_metadata({META_KEY: digest})
    pq.write_table(table, path)
    rewrite(root, part_bytes=None, part_checksums=None)
    with pytest.raises(DataError, match=rf"index rows of shard .*shard-0000\.tar: .*{problem}.*rebuild the index"):
        contents(root)


def test_a_part_that_is_no_file_is_one_error(root: Path) -> None:
    part = root / "index" / "samples-00000.parquet"
    part.unlink()
    part.mkdir()
    with pytest.raises(DataError, match=r"samples-00000\.parquet is not a regular file"):
        contents(root)
    shutil.rmtree(part)
    with pytest.raises(DataError, match="index rows of shard"):
        contents(root)
