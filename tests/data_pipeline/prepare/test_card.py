"""The dataset card of a prepared set: which files `datasets.load_dataset` takes for which split, and their features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tarflow.data_pipeline.prepare.sources import open_source
from tarflow.data_pipeline.prepare.write import Options, prepare
from tarflow.data_pipeline.storage.open_index import open_index


def card(folder: Path) -> dict[str, Any]:
    head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1:]
    assert "load_dataset" in text
    return dict(yaml.safe_load(head))


def files(folder: Path) -> dict[str, list[str]]:
    """Split -> the files that the card names, as they lie there."""
    (config,) = card(folder)["configs"]
    assert config["config_name"] == card(folder)["dataset_info"]["config_name"] == "default"
    return {
        entry["split"]: sorted(path.relative_to(folder).as_posix() for path in folder.glob(entry["path"]))
        for entry in config["data_files"]
    }


@pytest.mark.case("I03")
def test_the_card_names_the_shards_of_every_split_and_nothing_of_the_index(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((20, 4, 4), np.uint8), labels=np.array(["'a: é", "#b"] * 10))
    out = tmp_path / "out"
    prepare(open_source(tmp_path / "a.npz"), out, Options(size=4, val_fraction=0.5, shard_size=6))
    shards = [f"shard-{i:06d}.tar" for i in range(2)]
    assert files(out) == {
        "train": [f"train/{name}" for name in shards],
        "validation": [f"val/{name}" for name in shards],
    }
    assert files(out / "train") == {"train": shards}
    assert files(out / "val") == {"validation": shards}
    names = {"0": "#b", "1": "'a: é"}
    assert card(out)["dataset_info"]["features"] == [
        {"name": "png", "dtype": "image"}, {"name": "cls", "dtype": {"class_label": {"names": names}}},
        {"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"},
    ]  # fmt: skip
    assert open_index(out / "val").classes == list(names.values())


@pytest.mark.parametrize(("format", "field"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
@pytest.mark.case("I03")
def test_a_set_without_splits_and_labels(tmp_path: Path, format: str, field: str) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4), np.uint8))
    prepare(open_source(tmp_path / "a.npz"), tmp_path / "out", Options(size=4, format=format))
    assert files(tmp_path / "out") == {"train": ["shard-000000.tar"]}
    assert [entry["name"] for entry in card(tmp_path / "out")["dataset_info"]["features"]] == [
        field,
        "__key__",
        "__url__",
    ]


@pytest.mark.case("I03")
def test_found_splits_have_the_names_of_datasets(tmp_path: Path) -> None:
    one = np.zeros((1, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=one, x_val=one, x_test=one)
    prepare(open_source(tmp_path / "a.npz"), tmp_path / "out", Options(size=4))
    assert files(tmp_path / "out") == {
        "train": ["train/shard-000000.tar"], "validation": ["val/shard-000000.tar"], "test": ["test/shard-000000.tar"]
    }  # fmt: skip


@pytest.mark.case("I03")
def test_mds_shards_have_no_card_since_datasets_does_not_read_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4), np.uint8))
    prepare(open_source(tmp_path / "a.npz"), tmp_path / "out", Options(size=4, container="mds"))
    assert not list((tmp_path / "out").rglob("README.md"))
