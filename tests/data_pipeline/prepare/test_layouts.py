"""The layouts that people's data have, each as its publisher writes it: labels, names and splits, or a refusal that says how.

The red channel of every image tells which it is.
"""

from __future__ import annotations

import io
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tarflow.cli import parse
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.opening import read_image
from tarflow.data_pipeline.index.tar.members import TarScan
from tarflow.data_pipeline.loading.evaluation_batches import evaluation_batches
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import ImageShape
from tarflow.data_pipeline.prepare.arrays import read_idx
from tarflow.data_pipeline.prepare.fetch import fetch
from tarflow.data_pipeline.prepare.sources import open_source
from tarflow.data_pipeline.prepare.write import Options, prepare
from tarflow.data_pipeline.storage.open_index import open_index


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tree(root: Path, *names: str) -> Path:
    """Image files of these names below `root`; number i shows i."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return root


def content(root: Path) -> dict[int, str | int | None]:
    """What an image shows -> its class by name (by number where there are no names), of a prepared set."""
    index = open_index(root)
    shape = ImageShape(4, 3, index.num_classes or 0)
    found: dict[int, str | int | None] = {}
    for batch in evaluation_batches(DataSettings.of(root, on_error="skip"), ImageShape(4), 64):
        for image, sample in zip(batch.images, batch.ids.tolist()):
            shard, row = index.locate(sample)
            label = index.rows(shard).labels[row]
            named = index.classes[label] if index.classes and label >= 0 else None
            found[int(image[0, 0, 0])] = named if label >= 0 else None
    assert shape.channels == 3
    return found


def prepared(source: Path, out: Path, **choices: Any) -> dict[str, dict[int, str | int | None]]:
    """Split -> its content, after `data prepare`; '' for a set without splits."""
    report = prepare(open_source(source, **choices), out, Options(size=4))
    return {split: content(out / split) for split in report.written}


def refusal(source: Path, **choices: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_source(source, **choices)
    return str(caught.value)


# EDM and StyleGAN


def edm(root: Path, labels: Any) -> Path:
    tree(root, *(f"{i // 2:05d}/img{i:08d}.png" for i in range(4)))
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def edm_labels(values: list[Any]) -> list[list[Any]]:
    return [[f"{i // 2:05d}/img{i:08d}.png", value] for i, value in enumerate(values)]


@pytest.mark.case("F04")
def test_labels_come_from_dataset_json_not_from_the_chunks(tmp_path: Path) -> None:
    source = edm(tmp_path / "in", edm_labels([6, 9, 0, 6]))
    assert prepared(source, tmp_path / "out") == {"": {0: "6", 1: "9", 2: "0", 3: "6"}}
    index = open_index(tmp_path / "out")
    assert index.num_classes == 10
    assert "labels: dataset.json" in index.meta["origin"]
    assert "7 of 10 classes have no image: 1, 2, 3, 4, 5, 7, 8" in index.meta["origin"]
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["source"] == index.meta["origin"][:2]


@pytest.mark.parametrize("labels", [None, edm_labels([None] * 4)])
@pytest.mark.case("F04")
def test_null_labels_are_none(tmp_path: Path, labels: Any) -> None:
    assert prepared(edm(tmp_path / "in", labels), tmp_path / "out") == {"": dict.fromkeys(range(4))}
    assert open_index(tmp_path / "out").classes is None


@pytest.mark.case("F04")
def test_single_nulls_backslashes_and_names(tmp_path: Path) -> None:
    labels = [[name.replace("/", "\\"), value] for name, value in edm_labels([1, None, 0, 1])]
    assert prepared(edm(tmp_path / "in", labels), tmp_path / "out") == {"": {0: "1", 1: None, 2: "0", 3: "1"}}
    named = edm(tmp_path / "named", edm_labels(["dog", "cat", "dog", "eel"]))
    assert prepared(named, tmp_path / "out2") == {"": {0: "dog", 1: "cat", 2: "dog", 3: "eel"}}
    accents = tree(tmp_path / "accents", unicodedata.normalize("NFD", "été.png"))
    (accents / "dataset.json").write_text(json.dumps({"labels": [[unicodedata.normalize("NFC", "été.png"), 0]]}))
    assert prepared(accents, tmp_path / "out3") == {"": {0: "0"}}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (edm_labels([1, 2, 3]), "no label for 1 of 4 images, first 00001/img00000003.png"),
        (
            [*edm_labels([1, 2, 3, 4]), ["00002/img00000004.png", 5]],
            "labels for 1 files that are not there, first 00002",
        ),
        (edm_labels([[0.5, 1.0]] * 4), r"holds [0.5, 1.0], expected integers or names"),
        (edm_labels([0, 1, -1, 1]), "label -1 (row 2)"),
        (edm_labels([0, 1, 2, 3]) + edm_labels([0, 1, 3]), "two labels for 00000/img00000000.png"),
        (edm_labels([0, 1, "cat", 1]), "holds numbers (0) and names ('cat'): labels must be all of one kind"),
        ({"a": 1}, "\"labels\" is {'a': 1}, not a list"),
        ("img", "\"labels\" is 'img', not a list"),
        ([["a.png", 1], None], 'entry 1 of "labels" is None'),
        ([[3, 1]], 'entry 0 of "labels" is [3, 1]'),
        (["ab"], "entry 0 of \"labels\" is 'ab'"),
    ],
)
@pytest.mark.case("F04")
def test_a_list_that_does_not_fit_names_the_option_that_passes_it_over(
    tmp_path: Path, labels: Any, message: str
) -> None:
    source = edm(tmp_path / "in", labels)
    text = refusal(source)
    assert message in text
    assert "--labels folders" in text
    assert set(prepared(source, tmp_path / "out", labels="folders")[""].values()) == {"00000", "00001"}
    assert set(prepared(source, tmp_path / "none", labels="none")[""].values()) == {None}


@pytest.mark.case("F04")
def test_other_json_is_named_and_a_missing_list_too(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "a/0.png", "b/1.png")
    for text, reason in (
        ("[1, 2", "it is not JSON"),
        ("[1, 2]", "it is not a JSON object"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"label": []}', 'it has no "labels"'),
        ('{"labels": [["a/0.png"]]}', 'entry 0 of "labels" is'),
        ('{"labels": 7}', '"labels" is 7, not a list'),
    ):
        (source / "dataset.json").write_text(text)
        assert f"cannot read labels from {source / 'dataset.json'}: {reason}" in refusal(source)
    (source / "dataset.json").unlink()
    assert "there is no" in refusal(source, labels="dataset.json")


@pytest.mark.case("F04")
def test_chunks_without_a_list_are_a_question(tmp_path: Path) -> None:
    for name, chunks in {"plain": ("00000", "00001"), "thousands": ("00000", "01000"), "one": ("00000",)}.items():
        source = tree(tmp_path / name, *(f"{chunk}/{chunk}.png" for chunk in chunks))
        text = refusal(source)
        assert "--labels folders" in text
        assert "--labels none" in text
        assert prepared(source, tmp_path / f"{name}-out", labels="none") == {"": dict.fromkeys(range(len(chunks)))}


# class folders


def test_numbered_class_folders_keep_their_numbers(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", *(f"{i}/x.png" for i in range(11)))
    assert prepared(source, tmp_path / "out") == {"": {i: str(i) for i in range(11)}}
    index = open_index(tmp_path / "out")
    assert index.classes == [str(i) for i in range(11)]
    ones = open_source(tree(tmp_path / "ones", *(f"{i:04d}/x.png" for i in (1, 2, 10))))
    assert ones.classes == ["0001", "0002", "0010"]


def test_nested_class_folders_are_a_question_that_two_options_answer(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "animal/cat/0.png", "animal/dog/1.png", "plant/oak/2.png", "plant/oak/x/3.png")
    text = refusal(source)
    assert "animal (--labels folders) or animal/cat (--labels parents)" in text
    wrapped = refusal(tree(tmp_path / "w", "images/cat/0.png", "images/dog/1.png"))
    assert wrapped.endswith(f"if images only holds the data set, prepare {tmp_path}/w/images")
    assert prepared(source, tmp_path / "a", labels="folders")[""] == {0: "animal", 1: "animal", 2: "plant", 3: "plant"}
    assert prepared(source, tmp_path / "b", labels="parents")[""] == {
        0: "animal/cat", 1: "animal/dog", 2: "plant/oak", 3: "plant/oak/x"
    }  # fmt: skip


def test_a_data_set_deep_below_is_not_one_class(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "ILSVRC/Data/CLS-LOC/train/n01/0.png", "ILSVRC/Data/CLS-LOC/val/n01/1.png")
    text = refusal(source)
    assert text.endswith(f"if ILSVRC only holds the data set, prepare {source}/ILSVRC/Data/CLS-LOC")
    inside = source / "ILSVRC" / "Data" / "CLS-LOC"
    assert prepared(inside, tmp_path / "out") == {"train": {0: "n01"}, "val": {1: "n01"}}


def test_one_folder_below_each_class_is_no_question(tmp_path: Path) -> None:
    more = tree(
        tmp_path / "more", "n01/images/0.png", "n01/images/cut/1.png", "n02/2.png", "n02/x/3.png", "n02/y/4.png"
    )
    assert open_source(more).labels.tolist() == [0, 0, 1, 1, 1]
    source = tree(tmp_path / "in", "n01/images/0.png", "n02/images/1.png")
    assert prepared(source, tmp_path / "out") == {"": {0: "n01", 1: "n02"}}


# torchvision: train/ and val/


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "validation"), ("train", "valid"), ("train", "dev")])
@pytest.mark.case("F07")
def test_train_and_val_of_class_folders_are_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    train, val = names
    source = tree(
        tmp_path / "in", f"{train}/cat/0.png", f"{train}/dog/1.png", f"{train}/eel/2.png", f"{val}/dog/3.png", f"{val}/eel/4.png"
    )  # fmt: skip
    assert prepared(source, tmp_path / "out") == {"train": {0: "cat", 1: "dog", 2: "eel"}, "val": {3: "dog", 4: "eel"}}
    assert open_index(tmp_path / "out" / "val").classes == ["cat", "dog", "eel"]
    assert "splits by folder name: train (3 images), val (2 images)" in open_source(source).notes


@pytest.mark.case("F07")
def test_a_third_split_and_the_choice_of_some(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "train/cat/0.png", "val/cat/1.png", "test/cat/2.png", "train/dog/3.png")
    everything = {"train": {0: "cat", 3: "dog"}, "val": {1: "cat"}, "test": {2: "cat"}}
    assert prepared(source, tmp_path / "a") == everything
    assert prepared(source, tmp_path / "b", split="train,test") == {"train": everything["train"], "test": {2: "cat"}}
    assert prepared(source, tmp_path / "c", split="train") == {"": {0: "cat", 3: "dog"}}
    assert prepared(source, tmp_path / "d", split="validation") == {"": {1: "cat"}}
    assert prepared(source, tmp_path / "e", split="all") == {"": {0: "cat", 1: "cat", 2: "cat", 3: "dog"}}


@pytest.mark.case("F07")
def test_splits_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    more = tree(tmp_path / "more", "train/cat/0.png", "val/cat/1.png", "val/yak/2.png")
    assert "val has classes that train lacks (1): yak" in refusal(more)
    bare = tree(tmp_path / "bare", "train/cat/0.png", "train/dog/1.png", "val/2.png")
    text = refusal(bare)
    assert "labels of train: the names of the class folders; labels of val: none (no class folders)" in text
    assert "--split train" in text
    assert prepared(bare, tmp_path / "out", split="train") == {"": {0: "cat", 1: "dog"}}
    beside = tree(tmp_path / "beside", "train/cat/0.png", "val/cat/1.png", "extra/cat/2.png", "3.png")
    assert "also images beside them, extra: take splits with --split train,val" in refusal(beside)
    assert "also images beside them" in refusal(beside, split="all")
    (beside / "3.png").unlink()
    assert open_source(beside, labels="folders").classes == ["extra", "train", "val"]
    twice = tree(tmp_path / "twice", "train/cat/0.png", "val/cat/1.png", "valid/cat/2.png")
    assert "several folders for the split val: val, valid" in refusal(twice)
    assert "holds no split 'test' (--split test); by name it holds: train, val" in refusal(more, split="test")
    assert "names no splits" in refusal(more, split="middle")


@pytest.mark.case("F07")
def test_val_fraction_beside_splits(tmp_path: Path) -> None:
    both = tree(tmp_path / "both", "train/cat/0.png", "val/cat/1.png")
    with pytest.raises(DataError, match="has the splits train, val already"):
        prepare(open_source(both), tmp_path / "out", Options(size=4, val_fraction=0.5))
    assert not (tmp_path / "out").exists()
    test = tree(tmp_path / "test", *(f"train/cat/{i}.png" for i in range(8)), "test/cat/8.png")
    report = prepare(open_source(test), tmp_path / "out", Options(size=4, val_fraction=0.25))
    assert report.written == {"train": 6, "val": 2, "test": 1}
    assert list(content(tmp_path / "out" / "test")) == [8]


@pytest.mark.case("F07")
def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "car/0.png", "train/1.png", "ship/2.png")
    assert prepared(source, tmp_path / "out") == {"": {0: "car", 1: "train", 2: "ship"}}


# Parquet


def table(path: Path, numbers: list[int], labels: list[Any] | None = None, features: dict[str, Any] | None = None,
          label: str = "label") -> None:  # fmt: skip
    """As `datasets` writes it; `features` go into the schema."""
    columns: dict[str, Any] = {"image": [{"bytes": png(n), "path": f"{n}.png"} for n in numbers]}
    if labels is not None:
        columns[label] = labels
    made = pa.table(columns)
    if features:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path)


IMAGE = {"_type": "Image"}


def class_label(*names: str) -> dict[str, Any]:
    return {"names": list(names), "_type": "ClassLabel"}


NAMED = {"image": IMAGE, "label": class_label("airplane", "bird", "cat")}


@pytest.mark.case("F07")
def test_parquet_splits_are_made_and_names_of_the_schema_used(tmp_path: Path) -> None:
    source = tmp_path / "in"
    table(source / "train-00000-of-00002.parquet", [0, 1], [2, 0], NAMED)
    table(source / "train-00001-of-00002.parquet", [2], [1], NAMED)
    table(source / "validation-00000-of-00001.parquet", [3], [0], NAMED)
    table(source / "test-00000-of-00001.parquet", [4, 5], [-1, -1], NAMED)
    assert prepared(source, tmp_path / "out") == {
        "train": {0: "cat", 1: "airplane", 2: "bird"}, "val": {3: "airplane"}, "test": {4: None, 5: None}
    }  # fmt: skip
    notes = json.loads((tmp_path / "out" / "prepare.json").read_text())["source"]
    assert (
        notes[0].startswith("4 files read: test-00000-of-00001.parquet") or "train-00000-of-00002.parquet" in notes[0]
    )
    assert "splits by file name: train (3 images), val (1 image), test (2 images)" in notes
    assert "labels: column 'label', names from the schema (ClassLabel)" in notes
    assert "2 of 6 images have no label" in notes
    assert prepared(source, tmp_path / "one", split="test,val").keys() == {"val", "test"}


@pytest.mark.case("F07")
def test_parquet_below_folders_and_of_several_sets(tmp_path: Path) -> None:
    table(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", [0], [0], NAMED)
    (tmp_path / "hub" / "README.md").write_text("card")
    assert prepared(tmp_path / "hub", tmp_path / "a") == {"": {0: "airplane"}}
    table(tmp_path / "dirs" / "default" / "train" / "0000.parquet", [0], [0], NAMED)
    table(tmp_path / "dirs" / "default" / "test" / "0000.parquet", [1], [1], NAMED)
    assert prepared(tmp_path / "dirs", tmp_path / "b") == {"train": {0: "airplane"}, "test": {1: "bird"}}
    table(tmp_path / "sets" / "small" / "train.parquet", [0], [0], NAMED)
    table(tmp_path / "sets" / "large" / "train.parquet", [1], [0], NAMED)
    assert "holds Parquet files in the folders large, small: name one of them" in refusal(tmp_path / "sets")
    table(tmp_path / "part" / "train.parquet", [0], [0])
    table(tmp_path / "part" / "more.parquet", [1], [0])
    assert "some of it names a split (train) and some does not" in refusal(tmp_path / "part")
    assert prepared(tmp_path / "part", tmp_path / "c", split="all") == {"": {0: "0", 1: "0"}}


@pytest.mark.case("F07")
def test_columns_are_told_by_the_schema_or_asked_for(tmp_path: Path) -> None:
    fine = {
        "image": IMAGE,
        "coarse_label": class_label("fish", "trees"),
        "fine_label": class_label("ray", "oak", "eel"),
    }
    path = tmp_path / "cifar100.parquet"
    rows = pa.table(
        {"image": [{"bytes": png(i), "path": None} for i in range(2)], "coarse_label": [0, 1], "fine_label": [0, 1]}
    )
    pq.write_table(rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": fine}})}), path)
    source = open_source(path)
    assert (source.classes, source.labels.tolist()) == (["ray", "oak", "eel"], [0, 1])
    assert "other columns that may hold labels (--label-column): coarse_label" in source.notes
    assert open_source(path, label_column="coarse_label").classes == ["fish", "trees"]
    fine["fine_label"]["names"] = {"1": "oak", "0": "ray", "2": "eel"}
    pq.write_table(rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": fine}})}), path)
    assert open_source(path).classes == ["ray", "oak", "eel"]
    for text in ("x", "[]", '{"info": {"features": [1]}}', "[" * 100_000):
        pq.write_table(rows.replace_schema_metadata({"huggingface": text}), path)
        assert open_source(path).classes == ["0", "1"]
    odd = {"picture": IMAGE, "kind": class_label("a", "b"), "colour": class_label("red")}
    rows = rows.rename_columns(["picture", "kind", "colour"])
    pq.write_table(rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": odd}})}), path)
    assert "holds the labels: name it with --label-column (kind, colour)" in refusal(path)
    assert open_source(path, label_column="kind").labels.tolist() == [0, 1]
    assert open_source(path, labels="none").classes is None


@pytest.mark.case("F07")
def test_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    table(tmp_path / "names" / "train-0.parquet", [0], [0], NAMED)
    table(tmp_path / "names" / "train-1.parquet", [1], [0], {"image": IMAGE, "label": class_label("bird", "airplane")})
    text = refusal(tmp_path / "names")
    assert "class names of 'label'" in text
    assert "train-1.parquet" in text
    assert "train-0.parquet" in text
    table(tmp_path / "columns" / "train-0.parquet", [0], [0])
    table(tmp_path / "columns" / "test-0.parquet", [1], None)
    assert "test-0.parquet has no column 'label'" in refusal(tmp_path / "columns")
    table(tmp_path / "text.parquet", [0], ["bird"], NAMED)
    assert "holds 'bird', expected the numbers of its 3 names" in refusal(tmp_path / "text.parquet")
    table(tmp_path / "minus" / "train-0.parquet", [0, 1], [0, 1])
    table(tmp_path / "minus" / "validation-0.parquet", [2, 3], [1, -1])
    assert "of " + str(tmp_path / "minus" / "validation-0.parquet") + " holds the label -1 (row 1)" in refusal(
        tmp_path / "minus"
    )
    assert open_source(tmp_path / "minus", split="train").labels.tolist() == [0, 1]
    table(tmp_path / "beyond.parquet", [0, 1], [0, 3], NAMED)
    assert "holds the label 3 (row 1), its names end at 2" in refusal(tmp_path / "beyond.parquet")


@pytest.mark.case("I06")
def test_parquet_of_paths_alone_is_named(tmp_path: Path) -> None:
    paths = [{"bytes": None, "path": f"x/{i}.png"} for i in range(3)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(paths, kind)}), tmp_path / "paths.parquet")
    assert "holds paths such as 'x/0.png' and no bytes" in refusal(tmp_path / "paths.parquet")
    pq.write_table(pa.table({"image": ["x/0.png"]}), tmp_path / "text.parquet")
    assert "text may be paths, which are not followed" in refusal(tmp_path / "text.parquet")
    some = [{"bytes": png(0), "path": "0.png"}, {"bytes": None, "path": "x/1.png"}]
    pq.write_table(pa.table({"image": pa.array(some, kind)}), tmp_path / "some.parquet")
    with pytest.raises(DataError, match=r"some\.parquet row 1: no image bytes, only the path 'x/1\.png'"):
        prepare(open_source(tmp_path / "some.parquet"), tmp_path / "out", Options(size=4))
    report = prepare(open_source(tmp_path / "some.parquet"), tmp_path / "out", Options(size=4, on_error="skip"))
    assert (report.written, report.skipped) == ({"": 1}, {"no_bytes": 1})


# arrays


def pixels(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)


def test_npz_of_adm_holds_images_and_labels_in_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", pixels(0, 1, 2), np.array([7, 0, 7]))
    assert prepared(tmp_path / "adm.npz", tmp_path / "out") == {"": {0: "7", 1: "0", 2: "7"}}
    np.savez(tmp_path / "bare.npz", pixels(0, 1))
    assert prepared(tmp_path / "bare.npz", tmp_path / "out2") == {"": {0: None, 1: None}}


@pytest.mark.parametrize(
    "names", ["x_train y_train x_test y_test", "train_images train_labels test_images test_labels", "images_train labels_train images_test labels_test"]
)  # fmt: skip
@pytest.mark.case("F07")
def test_npz_arrays_of_several_splits(tmp_path: Path, names: str) -> None:
    arrays = dict(zip(names.split(), (pixels(0, 1), np.array([1, 0]), pixels(2), np.array([[1]]))))
    np.savez(tmp_path / "set.npz", **arrays, extra=np.zeros(3))
    assert prepared(tmp_path / "set.npz", tmp_path / "out") == {"train": {0: "1", 1: "0"}, "test": {2: "1"}}
    assert "arrays not used: extra" in open_source(tmp_path / "set.npz").notes
    image = names.split()[2]
    assert prepared(tmp_path / "set.npz", tmp_path / "one", image_column=image) == {"": {2: "1"}}
    merged = prepared(tmp_path / "set.npz", tmp_path / "all", split="all")
    assert merged == {"": {0: "1", 1: "0", 2: "1"}}
    assert "--label-column names one array" in refusal(tmp_path / "set.npz", label_column=names.split()[1])


@pytest.mark.case("F07")
def test_npz_one_hot_labels_are_read_and_other_tables_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "hot.npz", images=pixels(0, 1, 2), labels=np.eye(4, dtype=np.float32)[[2, 0, 3]])
    assert prepared(tmp_path / "hot.npz", tmp_path / "out") == {"": {0: "2", 1: "0", 2: "3"}}
    np.savez(tmp_path / "many.npz", images=pixels(0, 1), labels=np.array([[1, 1], [0, 1]]))
    assert "labels are [n], [n, 1] or one-hot rows" in refusal(tmp_path / "many.npz")
    np.savez(tmp_path / "half.npz", x_train=pixels(0), y_train=[1], x_test=pixels(1))
    assert "no labels for the split test" in refusal(tmp_path / "half.npz")


def test_labels_from_1_are_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "ones.npz", pixels(0, 1, 2), np.array([1, 2, 3]))
    notes = open_source(tmp_path / "ones.npz").notes
    assert notes[-1] == "1 of 4 classes have no image: 0; labels run from 1 to 3, so a model needs 4 classes"


@pytest.mark.case("F07")
def test_idx_files_of_both_splits(tmp_path: Path) -> None:
    def idx(path: Path, array: np.ndarray) -> None:
        path.parent.mkdir(exist_ok=True)
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        path.write_bytes(b"\0\0\x08" + bytes([array.ndim]) + sizes + array.astype(np.uint8).tobytes())

    root = tmp_path / "in"
    for part, numbers in (("train", [0, 1]), ("t10k", [2])):
        idx(root / f"{part}-images-idx3-ubyte", pixels(*numbers)[..., 0])
        idx(root / f"{part}-labels-idx1-ubyte", np.array(numbers))
    assert prepared(root, tmp_path / "out") == {"train": {0: "0", 1: "1"}, "test": {2: "2"}}
    assert prepared(root, tmp_path / "one", split="test") == {"": {2: "2"}}
    assert prepared(root, tmp_path / "all", split="all") == {"": {0: "0", 1: "1", 2: "2"}}
    idx(root / "letters-train-images-idx3-ubyte", pixels(0)[..., 0])
    assert "several IDX image files" in refusal(root)


# tars


def run_index(*words: object) -> int:
    args = parse(["data", "index", *map(str, words)])
    return int(args.command.run(args))


def test_img2dataset_as_tars(tmp_path: Path, lab: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for shard in range(2):
        members: list[tuple[str, bytes]] = []
        for i in range(2):
            key = f"{shard:05d}{i:04d}"
            row = {"caption": "a", "url": "u", "label": i, "key": key, "width": 4}
            members += [(f"{key}.jpg", png(i)), (f"{key}.json", json.dumps(row).encode()), (f"{key}.txt", b"a")]
        lab.write_tar(raw / f"{shard:05d}.tar", members)
        pq.write_table(pa.table({"url": ["u"], "caption": ["a"]}), raw / f"{shard:05d}.parquet")
        (raw / f"{shard:05d}_stats.json").write_text("{}")
    assert "holds 2 tars: tarflow data index" in refusal(raw)
    assert run_index(raw, "--out", tmp_path / "a") == 0
    text = capsys.readouterr().out
    assert "fields seen: jpg 4, json 4, txt 4" in text
    assert "labels: none of 4 samples has one (looked for in cls); --label-field json:KEY" in text
    assert "which holds caption, url, label, key, width" in text
    assert run_index(raw, "--label-field", "json:label") == 0
    assert content_of_tars(raw) == [0, 1, 0, 1]


def test_img2dataset_as_files(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "00000/000000000.png", "00001/000010000.png")
    for shard in ("00000", "00001"):
        pq.write_table(pa.table({"url": ["u"]}), source / f"{shard}.parquet")
        (source / shard / "000000000.json").write_text("{}")
    assert "--labels none" in refusal(source)
    assert prepared(source, tmp_path / "out", labels="none") == {"": {0: None, 1: None}}


def imagenet(root: Path, lab: SimpleNamespace) -> None:
    for name, numbers in (("train-0000", (0, 1)), ("train-0001", (2,)), ("validation-00", (3,))):
        members: list[tuple[str, bytes]] = []
        for i in numbers:
            members += [(f"n{i}.jpg", png(i)), (f"n{i}.cls", str(i).encode()), (f"n{i}.json", b"{}")]
        root.mkdir(exist_ok=True)
        lab.write_tar(root / f"imagenet1k-{name}.tar", members)


@pytest.mark.case("F07")
def test_imagenet_in_webdataset_form_is_indexed_split_by_split(
    tmp_path: Path, lab: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "imagenet1k"
    imagenet(root, lab)
    for words in ([root], [f"{root}/*.tar"], [f"{root}/imagenet1k-{{train-0000,validation-00}}.tar"]):
        with pytest.raises(
            DataError, match=r"name the splits train \(. shards?\), val \(1 shard\): .*--split train --out"
        ):
            run_index(*words)
    assert not (root / "index").exists()
    assert run_index(root, "--split", "train", "--out", tmp_path / "train") == 0
    assert run_index(root, "--split", "validation", "--out", tmp_path / "val") == 0
    assert "the split val: 1 of 3 shards, by their names" in capsys.readouterr().err
    assert sorted(content_of_tars(tmp_path / "train")) == [0, 1, 2]
    assert sorted(content_of_tars(tmp_path / "val")) == [3]
    assert run_index(root, "--split", "all") == 0
    assert open_index(root).num_samples == 4
    assert "taken as one set (--split all)" in open_index(root).meta["origin"][0]
    assert run_index(f"{root}/imagenet1k-train-*.tar", "--out", tmp_path / "again") == 0
    with pytest.raises(DataError, match="an index is of one split"):
        run_index(root, "--split", "test")


def content_of_tars(root: Path) -> list[int]:
    index = open_index(root)
    return [label for shard in range(len(index.shard_sizes)) for label in index.rows(shard).labels.tolist()]


@pytest.mark.case("F07")
def test_splits_by_folder_of_tars_and_of_streams(tmp_path: Path, lab: SimpleNamespace) -> None:
    lab.write_shards(tmp_path / "set" / "train", [2])
    lab.write_shards(tmp_path / "set" / "val", [1])
    with pytest.raises(DataError, match="name the splits train"):
        run_index(tmp_path / "set")
    assert run_index(tmp_path / "set" / "train") == 0
    from tarflow.data_pipeline.loading.stream.shards import stream_shards

    with pytest.raises(DataError, match=r"name several splits \(train, val\)"):
        stream_shards(tmp_path / "set")
    assert len(stream_shards(tmp_path / "set" / "val")) == 1


@pytest.mark.case("I06")
def test_parquet_beside_images_and_paths_that_cannot_be(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "a/0.png")
    pq.write_table(pa.table({"file_name": ["a/0.png"]}), source / "metadata.parquet")
    assert "holds Parquet files (first: metadata.parquet) and 1 images: name a Parquet file" in refusal(source)
    assert "there is nothing at" in refusal(tmp_path / ("x" * 300))
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert "there is nothing at" in refusal(tmp_path / "self")


# what it is when it is none of these


def write(name: str, data: bytes = b"x") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (write("a.png", png(0)), "a single image: name the folder"),
        (write("a.csv"), "a table: prepare the images that it lists"),
        (write("a.h5"), "an HDF5 file"),
        (write("a", b"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
        (write("data.mdb"), "an LMDB database"),
        (write("a.tfrecord-00000-of-00010"), "a TFRecord file"),
        (write("a.tar.gz"), "a compressed tar: unpack it"),
        (write("a.zip"), "a zip archive: unpack it"),
        (write("a", b"PK\x03\x04"), "a zip archive: unpack it"),
        (write("a.tar"), "a tar: tars of samples are indexed where they lie: tarflow data index"),
        (write("data_batch_1", b"\x80\x02}"), "a pickle, which could run any code"),
        (write("a.npy"), "a single array"),
        (write("data-00000-of-00001.arrow"), "save_to_disk"),
        (write("a.txt"), "cannot tell what"),
    ],
)  # fmt: skip
@pytest.mark.case("I06")
def test_what_a_file_is_and_what_to_do(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path)
    text = refusal(path)
    assert str(path) in text
    assert message in text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.tar.gz", "b.tar.gz"], "holds 2 .tar.gz files, each a compressed tar: unpack it"),
        (["x/a.tgz"], "holds 1 .tgz file, a compressed tar"),
        (["a.zip"], "holds 1 .zip file, a zip archive"),
        (["a.csv"], "holds 1 .csv file, a table"),
        (["data.mdb", "lock.mdb"], "an LMDB database"),
        (
            ["dataset_info.json", "state.json", "data-00000-of-00001.arrow"],
            "holds 1 .arrow file, an Arrow file, as `save_to_disk`",
        ),
        (["a.tfrecord-00000-of-00002"], "a TFRecord file"),
        (["train/index.json", "val/index.json"], "holds the MDS sets train, val: index each"),
        (["index.json"], "is an MDS set: tarflow data index"),
        (["index/shards.parquet"], "is a prepared and indexed data set already"),
        (["train/index/shards.parquet", "val/index/shards.parquet"], "holds the prepared data sets train, val"),
        (["a/b/c/d/x.txt"], "holds no images (not_an_image 1)"),
    ],
)
@pytest.mark.case("I06")
def test_what_a_folder_holds_and_what_to_do(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        write(name)(tmp_path / "in")
    assert message in refusal(tmp_path / "in")
    if names != ["index.json"] and "shards.parquet" not in names[0]:
        with pytest.raises(DataError) as caught:  # the other way in says the same
            run_index(tmp_path / "in")
        assert message in str(caught.value) or "no images" in message


@pytest.mark.case("I06")
def test_a_path_for_training_that_is_no_data_set_is_named(tmp_path: Path) -> None:
    for name, message in (
        ("train/index.json", "holds the MDS sets train: index each"),
        ("a.zip", "holds 1 .zip file, a zip archive"),
    ):
        write(name)(tmp_path / name[0])
        with pytest.raises(DataError) as caught:
            open_index(tmp_path / name[0])
        assert message in str(caught.value)
    with pytest.raises(
        DataError, match=r"b\.npz is not a data set: .*\(it is a file of arrays: tarflow data prepare reads it\)"
    ):
        open_index(write("b.npz")(tmp_path))


@pytest.mark.case("I06")
def test_index_says_what_prepare_is_for(tmp_path: Path) -> None:
    tree(tmp_path / "in", "a/0.png", "b/1.png")
    with pytest.raises(
        DataError, match=r"holds no \*\.tar files; .*holds 2 images: tarflow data prepare .* OUT --size"
    ):
        run_index(tmp_path / "in")
    with pytest.raises(DataError, match=r"0\.png is not a tar of samples but a single image"):
        run_index(tmp_path / "in" / "a" / "0.png")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a Parquet file: tarflow data prepare reads it"):
        run_index(tmp_path / "a.parquet")


@pytest.mark.case("H06")
@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_what_is_no_file_in_the_place_of_an_idx_file_is_refused_in_words(tmp_path: Path, what: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    os.mkfifo(path) if what == "pipe" else path.mkdir()
    with pytest.raises(DataError, match=r"cannot read .*idx3-ubyte: it is not a regular file"):
        read_idx(path)


@pytest.mark.case("H06")
@pytest.mark.parametrize(
    ("name", "open_it", "error"),
    [
        ("a.parquet", open_source, DataError),
        ("a.csv.gz", lambda path: fetch("mnist5k", path.parent / "out", source=path), DataError),
        ("a.png", read_image, OSError),
        ("a.tar", lambda path: TarScan(path, offsets=[0], sizes=[1]).content(0), OSError),
    ],
)
def test_a_pipe_in_the_place_of_any_source_is_not_waited_for(
    tmp_path: Path, name: str, open_it: Callable[[Path], object], error: type[Exception]
) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(error, match="it is not a regular file"):
        open_it(tmp_path / name)
