"""MDS sets: written and read by `streaming` and by us, with the same order as tars, or refused by name."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.index.mds import mds_shards, write_mds
from tarflow.data_pipeline.loading.loader import Batch
from tarflow.data_pipeline.storage.open_index import open_index
from tests.helpers.loaders import make_loader

ARGS: dict[str, Any] = {"image_size": 8, "channels": 3, "global_batch_size": 6}


def take(data: Path, count: int, **options: Any) -> list[Batch]:
    with make_loader(data, **(ARGS | options)) as loader:
        return list(itertools.islice(loader, count))


def write(folder: Path, columns: dict[str, str], samples: list[dict[str, Any]], **options: Any) -> Path:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=columns, size_limit=1500, **options) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def forge(folder: Path, sizes: list[int], images: Callable[[int], bytes]) -> None:
    """An MDS set with exactly these shard sizes, byte by byte as version 2 of the format is described."""
    folder.mkdir()
    listed, number = [], 0
    for shard, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            image = images(number)
            samples.append(np.uint32(len(image)).tobytes() + image + np.int64(number % 3).tobytes())
            number += 1
        header = b"{}"
        ends = 4 * (size + 2) + len(header) + np.cumsum([0, *map(len, samples)])
        data = np.uint32(size).tobytes() + ends.astype(np.uint32).tobytes() + header + b"".join(samples)
        name = f"shard.{shard:05d}.mds"
        (folder / name).write_bytes(data)
        listed.append({
            "column_names": ["image", "label"], "column_encodings": ["bytes", "int"], "column_sizes": [None, 8],
            "compression": None, "format": "mds", "hashes": [], "samples": size, "size_limit": None, "version": 2,
            "zip_data": None, "raw_data": {"basename": name, "bytes": len(data), "hashes": {}},
        })  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": listed}))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_mds_set_gives_the_batches_of_the_same_tars(
    make_set: Callable[..., Path], tmp_path: Path, lab: SimpleNamespace, workers: int
) -> None:
    """The same shard sizes, so the same order: for one process, for ranks, after a resume."""
    sizes = [10, 1, 7]
    tars = make_set(sizes)
    forge(tmp_path / "mds", sizes, lab.image_bytes)
    build_index(tmp_path / "mds", [tmp_path / "mds"])
    for options in ({}, {"rank": 1, "world_size": 2, "images_seen": 30}, {"num_canonical_nodes": 2}):
        arguments: dict[str, Any] = {"num_classes": 3, "num_workers": workers, **options}
        for ours, theirs in zip(take(tmp_path / "mds", 7, **arguments), take(tars, 7, **arguments)):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.ids, theirs.ids)


def test_what_we_write_streaming_reads_and_so_do_we(tmp_path: Path, lab: SimpleNamespace) -> None:
    from streaming.base.format import reader_from_json

    folder = tmp_path / "set"
    assert write_mds(folder, ((lab.image_bytes(i), i % 3) for i in range(25)), 1500) == 25
    listed = json.loads((folder / "index.json").read_text())["shards"]
    theirs = [sample for entry in listed for sample in reader_from_json(str(folder), None, entry)]
    assert [(sample["image"], sample["label"]) for sample in theirs] == [(lab.image_bytes(i), i % 3) for i in range(25)]
    index, _ = build_index(folder, [folder])
    assert len(index.shard_sizes) == len(listed) > 1
    assert (index.form, index.num_samples, index.num_classes) == ("mds", 25, 3)
    with make_loader(folder, **ARGS, reader="mds", num_classes=3) as loader:
        assert loader.reader == "mds"
        for batch in itertools.islice(loader, 4):
            assert [lab.number_of(image) for image in batch.images] == batch.ids.tolist()
            assert batch.labels.tolist() == [i % 3 for i in batch.ids.tolist()]


def test_columns_of_every_readable_kind(tmp_path: Path, lab: SimpleNamespace) -> None:
    columns = {"a": "str", "jpg": "bytes", "cls": "uint16", "__key__": "str", "z": "json"}
    samples = [
        {"a": "x" * i, "jpg": lab.image_bytes(i), "cls": 60_000 + i, "__key__": f"k{i}", "z": {"i": i}}
        for i in range(9)
    ]
    index, _ = build_index(tmp_path, [write(tmp_path / "one", columns, samples)])
    keys, labels = [], []
    for shard in range(len(index.shard_sizes)):
        keys += index.read(shard)["key"].to_pylist()
        labels += index.rows(shard).labels.tolist()
    assert keys == [f"k{i}" for i in range(9)]
    assert labels == [60_000 + i for i in range(9)]
    named = [{"picture": lab.image_bytes(i), "breed": ["cat", "dog"][i % 2]} for i in range(4)]
    folder = write(tmp_path / "two", {"picture": "bytes", "breed": "str"}, named)
    index, _ = build_index(folder, [folder], label_field="breed", classes=["cat", "dog"])
    assert np.concatenate([index.rows(s).labels for s in range(len(index.shard_sizes))]).tolist() == [0, 1, 0, 1]
    index, _ = build_index(folder, [folder])
    assert index.unlabelled == 4


@pytest.mark.parametrize(
    ("columns", "sample", "options", "message"),
    [
        (
            {"image": "ndarray"},
            {"image": np.zeros(3)},
            {},
            r"column 'image' is ndarray, the bytes of an image file must be",
        ),
        ({"x1": "int"}, {"x1": 3}, {}, r"no column that holds the bytes of an image file; it has x1 \(int\)"),
        (
            {"image": "bytes", "label": "float32"},
            {"image": b"x", "label": 1.0},
            {},
            r"column 'label' is float32, labels must",
        ),
        ({"image": "bytes"}, {"image": b"x"}, {"label_field": "cls"}, r"no column 'cls' \(--label-field\)"),
    ],
)
def test_what_cannot_be_read_by_offset_is_refused_by_name(
    tmp_path: Path, columns: dict[str, str], sample: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "set", columns, [sample])
    with pytest.raises(DataError, match=message) as caught:
        build_index(folder, [folder], **options)
    assert "shard.00000.mds" in str(caught.value)


def test_compressed_shards_are_refused(tmp_path: Path, lab: SimpleNamespace) -> None:
    folder = write(tmp_path / "set", {"image": "bytes"}, [{"image": lab.image_bytes(1)}], compression="zstd")
    with pytest.raises(
        DataError, match=r"shard\.00000\.mds is compressed \(zstd\): reading by offset needs plain shards"
    ):
        build_index(folder, [folder])


@pytest.mark.case("D02")
def test_damaged_mds_shards_are_named_or_left_out(tmp_path: Path, lab: SimpleNamespace) -> None:
    folder = tmp_path / "set"
    forge(folder, [4, 4, 4], lab.image_bytes)
    path = folder / "shard.00001.mds"
    whole = path.read_bytes()
    backwards = bytearray(whole)
    backwards[8:12] = np.uint32(1).tobytes()
    for bad, message in (
        (whole[:-5], r"has \d+ bytes, index\.json says \d+"),
        (np.uint32(9).tobytes() + whole[4:], "does not hold 4 samples"),
        (bytes(backwards), "run backwards or beyond|has columns of"),
        (None, "there is no such file"),
    ):
        path.unlink(missing_ok=True)
        if bad is not None:
            path.write_bytes(bad)
        with pytest.raises(DataError, match=rf"shard\.00001\.mds: damaged: .*({message})"):
            build_index(folder, [folder])
        index, report = build_index(folder, [folder], on_error="skip")
        assert index.shard_sizes.tolist() == [4, 0, 4]
        assert report.problems == {"damaged_shard": 1}
    (folder / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot read .*index\.json as the index of an MDS set"):
        mds_shards(folder)


def test_the_reader_that_was_asked_for_must_fit(
    make_set: Callable[..., Path], tmp_path: Path, lab: SimpleNamespace
) -> None:
    tars = make_set([6])
    forge(tmp_path / "mds", [6], lab.image_bytes)
    with pytest.raises(DataError, match=r"no index yet: run `tarflow data index .*mds"):
        open_index(tmp_path / "mds")
    build_index(tmp_path / "mds", [tmp_path / "mds"])
    with pytest.raises(DataError, match=r"tar shards: data\.reader=indexed or auto, not mds"):
        make_loader(tars, **ARGS, reader="mds")
    with pytest.raises(DataError, match=r"mds shards: data\.reader=mds or auto, not indexed"):
        make_loader(tmp_path / "mds", **ARGS, reader="indexed")
    with pytest.raises(DataError, match=r"data\.reader cannot be 'wds': .*'auto', 'indexed', 'mds' or 'stream'"):
        make_loader(tars, **ARGS, reader="wds")


@pytest.mark.case("D12")
def test_nothing_of_mds_lands_in_shared_memory(tmp_path: Path, lab: SimpleNamespace) -> None:
    forge(tmp_path / "mds", [20], lab.image_bytes)
    build_index(tmp_path / "mds", [tmp_path / "mds"])
    before = set(os.listdir("/dev/shm"))
    with make_loader(tmp_path / "mds", **ARGS, num_workers=1) as loader:
        next(iter(loader))
        assert set(os.listdir("/dev/shm")) <= before


def test_what_mds_cannot_hold_and_a_missing_package_are_named(
    tmp_path: Path, lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="some images have labels and some have none"):
        write_mds(tmp_path / "a", iter([(lab.image_bytes(0), 1), (lab.image_bytes(1), -1)]), 1500)
    assert write_mds(tmp_path / "b", iter([]), 1500) == 0
    monkeypatch.setitem(sys.modules, "streaming", None)
    with pytest.raises(DataError, match=r"needs the package mosaicml-streaming .*pip install 'tarflow\[mds\]'"):
        write_mds(tmp_path / "c", iter([(lab.image_bytes(0), 1)]), 1500)
