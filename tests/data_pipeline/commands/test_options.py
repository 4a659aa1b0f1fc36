"""Every option of `data prepare`, `fetch` and `index` has its effect or is refused, for every kind of source."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tarflow.cli import parse
from tarflow.data_pipeline.commands.data import VERBS
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.storage.open_index import open_index


def tarflow_data(*words: object) -> int:
    args = parse(["data", *(str(word) for word in words)])
    return int(args.command.run(args))


def refused(*words: object) -> str:
    with pytest.raises(DataError) as caught:
        tarflow_data(*words)
    return str(caught.value)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind: 12 images of two classes."""
    root = tmp_path_factory.mktemp("sources")
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    names = ["cat", "dog"] * 6
    np.savez(root / "a.npz", images=images, labels=np.array(names), other=images[::-1], marks=np.arange(12))
    rows: dict[str, list[Any]] = {"image": [], "label": names, "other": [], "marks": list(range(12))}
    for i, name in enumerate(names):
        path = root / "folder" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)
        rows["image"].append(path.read_bytes())
        rows["other"].append(path.read_bytes())
    pq.write_table(pa.table(rows), root / "a.parquet")
    (root / "idx").mkdir()
    for name, array in (("images-idx3", images[..., 0]), ("labels-idx1", np.arange(12) % 2)):
        head = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (root / "idx" / f"{name}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
    (root / "classes.json").write_text('["eel", "dog", "cat"]')
    return {"npz": root / "a.npz", "parquet": root / "a.parquet", "folder": root / "folder", "idx": root / "idx",
            "classes": root / "classes.json"}  # fmt: skip


# Per option of `prepare`: a value, and the kinds of source for which it has an effect; the others refuse it.
EVERY = {"npz", "parquet", "folder", "idx"}
SOURCE_OPTIONS = {
    "--image-column": ("other", {"npz", "parquet"}),
    "--label-column": ("marks", {"npz", "parquet"}),
    "--labels": ("none", EVERY),
    "--split": ("train", set()),  # of one set: there is no split of that name
    "--classes": ("CLASSES", EVERY),
    "--max-pixels": ("63", {"parquet", "folder"}),  # of images that have 64
}


@pytest.mark.parametrize("kind", sorted(EVERY))
@pytest.mark.parametrize("option", list(SOURCE_OPTIONS))
@pytest.mark.case("I04")
def test_options_of_the_source_have_an_effect_or_are_refused(
    tmp_path: Path, sources: dict[str, Path], kind: str, option: str
) -> None:
    value, effective = SOURCE_OPTIONS[option]
    words = [
        "prepare",
        sources[kind],
        tmp_path / "out",
        "--size",
        4,
        option,
        value.replace("CLASSES", str(sources["classes"])),
    ]
    if kind not in effective:
        assert option in refused(*words)
        assert not (tmp_path / "out").exists()
        return
    if option == "--max-pixels":
        with pytest.raises(DataError, match=r"64 pixels.*63"):
            tarflow_data(*words)
        assert tarflow_data(*words[:-1], 64) == 0
        return
    assert tarflow_data(*words) == 0
    tarflow_data("prepare", sources[kind], tmp_path / "plain", "--size", 4)
    with_it, without = open_index(tmp_path / "out"), open_index(tmp_path / "plain")
    if option == "--image-column" and kind == "parquet":  # the same images twice
        assert "images: column 'other'" in with_it.meta["origin"]
    elif option == "--image-column":
        assert (tmp_path / "out" / "shard-000000.tar").read_bytes() != (
            tmp_path / "plain" / "shard-000000.tar"
        ).read_bytes()
    else:
        assert with_it.fingerprint != without.fingerprint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quality", 50], "--quality 50 is for --format jpeg, png is lossless"),
        (["--quality", 50, "--format", "webp"], "webp is lossless"),
        (
            ["--container", "mds", "--shard-size", 100],
            "--shard-size 100 counts the samples of a tar, MDS shards end at 64 MiB",
        ),
        (["--labels", "folders"], "--labels folders has no effect on an .npz file"),
        (["--labels", "none", "--label-column", "marks"], "contradict each other"),
        (["--labels", "none", "--classes", "CLASSES"], "--classes names classes, but there are no labels"),
        (["--size", 0], "--size cannot be 0"),
        (["--size", 16_385], "--size cannot be 16385"),
    ],
)
@pytest.mark.case("I04")
def test_options_of_the_writing_that_would_be_passed_over(
    tmp_path: Path, sources: dict[str, Path], words: list[object], message: str
) -> None:
    words = [str(sources["classes"]) if word == "CLASSES" else word for word in words]
    assert message in refused("prepare", sources["npz"], tmp_path / "out", "--size", 4, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("container", ["webdataset", "mds"])
@pytest.mark.case("I04")
def test_options_of_the_writing_have_an_effect_in_both_containers(
    tmp_path: Path, sources: dict[str, Path], container: str
) -> None:
    def content(name: str, *words: object) -> tuple[bytes, list[int], Any]:
        out = tmp_path / name
        tarflow_data("prepare", sources["npz"], out, "--size", 4, "--container", container, *words)
        shards = sorted(out.glob("*.tar")) + sorted(out.glob("*.mds"))
        index = open_index(out)
        return b"".join(shard.read_bytes() for shard in shards), index.shard_sizes.tolist(), index.image_size

    plain = content("plain")
    assert plain[2] == (4, 4)
    options: list[tuple[object, ...]] = [
        ("--format", "webp"), ("--format", "jpeg"), ("--format", "jpeg", "--quality", 30), ("--channels", 1), ("--seed", 1),
        ("--crop", "adm"), ("--crop", "edm"), ("--size", "4,2"),
    ]  # fmt: skip
    if container == "webdataset":
        options.append(("--shard-size", 5))
    results = [content(f"{i}", *words) for i, words in enumerate(options)]
    assert len({data for data, *_ in (plain, *results)}) == len(options) + 1
    if container == "webdataset":
        assert results[-1][1] == [5, 5, 2]


@pytest.mark.case("I04")
def test_mds_columns_hold_all_labels_or_none_which_is_said_before_the_work(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"never read"] * 3, "label": [0, None, 1]}), tmp_path / "a.parquet")
    text = refused("prepare", tmp_path / "a.parquet", tmp_path / "out", "--size", 4, "--container", "mds")
    assert text.startswith("2 of 3 images have a label, MDS columns hold one for all or none")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.case("V03")
def test_classes_of_another_set_number_this_one(tmp_path: Path, sources: dict[str, Path]) -> None:
    """A held-out set that lacks a class gets the numbers of the training set."""
    for kind in ("npz", "parquet", "folder"):
        tarflow_data("prepare", sources[kind], tmp_path / kind, "--size", 4, "--classes", sources["classes"])
        index = open_index(tmp_path / kind)
        assert index.classes == ["eel", "dog", "cat"]
        assert set(index.rows(0).labels.tolist()) == {1, 2}
        assert json.loads((tmp_path / kind / "classes.json").read_text()) == ["eel", "dog", "cat"]
    (tmp_path / "few.json").write_text('["cat"]')
    for kind in ("npz", "folder"):
        text = refused("prepare", sources[kind], tmp_path / "out", "--size", 4, "--classes", tmp_path / "few.json")
        assert "has classes that --classes does not list: dog; it lists cat" in text
    text = refused("prepare", sources["idx"], tmp_path / "out", "--size", 4, "--classes", tmp_path / "few.json")
    assert "holds the label 1, --classes lists 1 names" in text


@pytest.mark.case("I04")
def test_val_fraction_of_fetch(tmp_path: Path) -> None:
    rows = "\n".join(",".join(["1"] * 784 + [str(i // 10)]) for i in range(100))
    import gzip

    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress(rows.encode()))
    fetch = ["fetch", "mnist5k"]
    tarflow_data(*fetch, tmp_path / "a", "--source", tmp_path)
    assert open_index(tmp_path / "a" / "val").num_samples == 10
    tarflow_data(*fetch, tmp_path / "b", "--source", tmp_path, "--val-fraction", 0.3)
    assert open_index(tmp_path / "b" / "val").num_samples == 30
    tarflow_data(*fetch, tmp_path / "c", "--source", tmp_path, "--val-fraction", 0)
    assert open_index(tmp_path / "c").num_samples == 100
    photo = tmp_path / "share" / "backgrounds" / "mate" / "nature" / "Dune.jpg"
    photo.parent.mkdir(parents=True)
    for name in ("Dune", "Storm"):
        Image.new("RGB", (600, 300)).save(photo.with_stem(name))
    text = refused("fetch", "photos", tmp_path / "d", "--source", tmp_path / "share", "--val-fraction", 0.3)
    assert "--val-fraction 0.3 splits a set, but the source has the splits train, val already" in text
    assert "--size cannot be 0" in refused(*fetch, tmp_path / "e", "--size", 0)


@pytest.mark.case("I04")
def test_options_of_index_and_info(tmp_path: Path, lab: SimpleNamespace) -> None:
    lab.write_shards(tmp_path, [2])
    tarflow_data("index", tmp_path)
    for flag in ("--count", "--tile"):
        assert f"{flag} 3 is for the contact sheet" in refused("info", tmp_path, flag, 3)
        assert f"{flag} 0" in refused("info", tmp_path, flag, 0, "--sheet", tmp_path / "s.png")
    assert "no sample found" in refused("index", tmp_path, "--image-field", "jpg")
    mds = tmp_path / "mds"
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4), np.uint8), labels=np.arange(3))
    tarflow_data("prepare", tmp_path / "a.npz", mds, "--size", 4, "--container", "mds")
    assert "--split train has no effect on an MDS set" in refused("index", mds, "--split", "train")
    assert "no column 'jpg' (--image-field); it has image (bytes), label (int)" in refused(
        "index", mds, "--image-field", "jpg"
    )
    assert "labels: 3 of 3 samples, from label" in open_index(mds).meta["origin"]
    assert "no column 'json:x' (--label-field)" in refused("index", mds, "--label-field", "json:x")
    assert "column 'label' is int, the bytes of an image" in refused("index", mds, "--image-field", "label")
    tarflow_data("index", mds, "--measure", "--image-field", "image")
    assert open_index(mds).read(0, ["width"])["width"].to_pylist() == [4, 4, 4]


@pytest.mark.case("I04")
def test_this_page_knows_every_option() -> None:
    """A new option comes here, too: its effect is tested or it is refused."""
    tested = {
        "prepare": {"size", "crop", "val_fraction", "format", "quality", "channels", "shard_size", "container", "seed", "on_error",
                    "source", "out", *(name[2:].replace("-", "_") for name in SOURCE_OPTIONS)},
        "fetch": {"name", "out", "size", "source", "val_fraction", "format", "quality", "channels", "shard_size", "container",
                  "seed", "on_error", "max_pixels"},
        "index": {"shards", "out", "classes", "split", "image_field", "label_field", "measure", "processes", "on_error"},
    }  # fmt: skip
    for verb, names in tested.items():
        parser = argparse.ArgumentParser(add_help=False)
        importlib.import_module(VERBS[verb][0]).add_arguments(parser)
        assert {action.dest for action in parser._actions} == names, verb
