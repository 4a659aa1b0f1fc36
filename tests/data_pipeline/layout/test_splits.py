"""Which names tell a split."""

from __future__ import annotations

from pathlib import Path

import pytest

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.layout.splits import asked_splits, by_split, chosen, split_of


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00005.parquet", "train"), ("test.tar", "test"), ("validation-00.tar", "val"), ("dev.parquet", "val"),
        ("imagenet1k-train-0000.tar", "train"), ("imagenet1k-validation-07.tar", "val"), ("x_train", "train"),
        ("train0001.tar", "train"), ("TRAIN_0.tar", "train"), ("t10k-images-idx3-ubyte.gz", "test"),
        ("default/train/0000.parquet", "train"), ("train/test-0.parquet", "test"), ("train/0.tar", "train"),
        ("training_set.parquet", "train"), ("set/valid/a.tar", "val"),
        ("trainval-0.tar", None), ("train-val.tar", None), ("constraint-0.tar", None), ("latest.tar", None),
        ("trains.tar", None), ("devices.tar", None), ("shard-000000.tar", None), ("00000.tar", None), ("retest.tar", None),
    ],
)  # fmt: skip
@pytest.mark.case("F07")
def test_words_of_their_own_tell_a_split(name: str, split: str | None) -> None:
    assert split_of(Path(name)) == split


@pytest.mark.case("F07")
def test_folders_above_the_root_tell_nothing() -> None:
    root = Path("/data/train/set")
    found = by_split([root / "a.tar", root / "val" / "b.tar", root / "train-1.tar"], root)
    assert found == {"train": [root / "train-1.tar"], "val": [root / "val" / "b.tar"], "": [root / "a.tar"]}
    assert list(found) == ["train", "val", ""]


@pytest.mark.case("F07")
def test_what_is_asked_for() -> None:
    assert asked_splits("train, Validation") == ["train", "val"]
    assert asked_splits("all") == ["all"]
    for text in ("", "middle", "train,all", "val,valid", "train,"):
        with pytest.raises(DataError, match="names no splits"):
            asked_splits(text)
    assert chosen(["train", "val"], None, "x") == ["train", "val"]
    assert chosen(["train", "val"], "val", "x") == ["val"]
    with pytest.raises(DataError, match="x holds no split 'test'"):
        chosen(["train", "val"], "test", "x")
    with pytest.raises(DataError, match=r"x: some of it names a split \(train\) and some does not"):
        chosen(["train", ""], None, "x")
