"""The official files of downsampled ImageNet: pickled or .npz rows of planes, labels from 1, batches and val as splits."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.evaluation_batches import evaluation_batches
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import ImageShape
from tarflow.data_pipeline.prepare.downsampled import batches
from tarflow.data_pipeline.prepare.downsampled.rows import side_of
from tarflow.data_pipeline.prepare.sources import open_source
from tarflow.data_pipeline.prepare.write import Options, prepare
from tarflow.data_pipeline.storage.open_index import open_index

SIDE = 8
ROW = 3 * SIDE * SIDE
FORMS = ["npz", *range(2, pickle.HIGHEST_PROTOCOL + 1), "python 2"]


def images(count: int, seed: int) -> np.ndarray:
    """uint8 [count, SIDE, SIDE, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


class AsPython2:
    """An array as Python 2 pickles it: its bytes are text."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self) -> Any:
        reduced: Any = self.array.__reduce__()
        made, arguments, (version, shape, kind, fortran, raw) = reduced
        return made, arguments, (version, shape, kind, fortran, raw.decode("latin1"))


def write(path: Path, rows: np.ndarray, labels: Any, form: Any = 4, **more: Any) -> Path:
    found: dict[str, Any] = {"data": rows, "labels": labels, "mean": rows.mean(axis=0), **more}
    if labels is None:
        del found["labels"]
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "npz":
        path = path.with_name(path.name + ".npz")
        with path.open("wb") as file:
            np.savez(file, **found)
    elif form == "python 2":
        path.write_bytes(
            pickle.dumps({k: AsPython2(v) if isinstance(v, np.ndarray) else v for k, v in found.items()}, 2)
        )
    else:
        path.write_bytes(pickle.dumps(found, form))
    return path


def rows_of(pictures: np.ndarray) -> np.ndarray:
    return pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1)


def official(root: Path, form: Any = 4) -> dict[str, dict[bytes, int]]:
    """Three training batches and the validation images; split -> pixels -> class."""
    expected: dict[str, dict[bytes, int]] = {"train": {}, "val": {}}
    for number, name in enumerate(("train_data_batch_1", "train_data_batch_2", "train_data_batch_3", "val_data")):
        pictures, labels = images(4, number), [1 + (number + i) % 5 for i in range(4)]
        write(root / name, rows_of(pictures), labels, form)
        split = expected["val" if name == "val_data" else "train"]
        split |= {picture.tobytes(): label - 1 for picture, label in zip(pictures, labels)}
    return expected


def content(root: Path) -> dict[bytes, int]:
    index = open_index(root)
    found = {}
    for batch in evaluation_batches(DataSettings.of(root), ImageShape(SIDE, 3, index.num_classes or 0), 64):
        for image, label in zip(batch.images, batch.labels.tolist()):
            found[image.permute(1, 2, 0).contiguous().numpy().tobytes()] = label
    return found


@pytest.mark.parametrize("form", FORMS)
def test_planes_become_pixels_and_labels_begin_at_0(tmp_path: Path, form: Any) -> None:
    expected = official(tmp_path / "in", form)
    source = open_source(tmp_path / "in")
    prepare(source, tmp_path / "out", Options(size=SIDE))
    assert {split: content(tmp_path / "out" / split) for split in expected} == expected
    assert source.notes[1] == "images: rows of 192 values, the planes R, G, B of 8 x 8 pixels"
    assert "splits by file name: train (12 images), val (4 images)" in source.notes
    assert any(
        note.startswith("labels: the files number classes from 1, here they begin at 0") for note in source.notes
    )
    one = open_source(next((tmp_path / "in").glob("train_data_batch_2*")))
    assert (len(one), one.labels.tolist()) == (4, [1, 2, 3, 4])
    assert open_source(tmp_path / "in", labels="none").labels.tolist() == [-1] * 16
    assert len(open_source(tmp_path / "in", split="val")) == 4


def test_files_larger_than_memory_should_hold_are_read_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = official(tmp_path / "in")
    monkeypatch.setattr(batches, "WINDOW_BYTES", 2 * ROW)  # a file has four rows, and two windows are kept
    monkeypatch.setattr("tarflow.data_pipeline.prepare.order.WINDOW_BYTES", 2 * ROW)
    read: list[str] = []
    original = batches.read_rows

    def noted(path: Path, labelled: bool = True) -> Any:
        read.append(path.name)
        return original(path, labelled)

    monkeypatch.setattr(batches, "read_rows", noted)
    prepare(open_source(tmp_path / "in"), tmp_path / "out", Options(size=SIDE))
    assert {split: content(tmp_path / "out" / split) for split in expected} == expected
    assert 7 <= len(read) <= 4 + 2 * 4, "each file once to look through it, and once for each split that is written"


def test_the_published_sizes_are_known() -> None:
    assert [side_of(length, Path("x")) for length in (12_288, 3_072, 768, 192)] == [64, 32, 16, 8]


ROWS = rows_of(images(3, 0))
WRONG: dict[str, tuple[Any, str]] = {
    "row length": ((np.zeros((3, 12_289), np.uint8), [1, 2, 3]), r"rows of 12,289 values; .* 12,288 \(3 x 64 x 64\), 3,072 \(3 x 32"),
    "type": ((ROWS.astype(np.float32), [1, 2, 3]), r"float32 \[3, 192\] as `data`, not rows of uint8"),
    "shape": ((ROWS.reshape(3, 3, 8, 8), [1, 2, 3]), r"uint8 \[3, 3, 8, 8\] as `data`"),
    "label 0": ((ROWS, [1, 0, 2]), r"the label 0 \(row 1\), and its classes are numbered from 1"),
    "label": ((ROWS, [1, 10**9, 2]), r"the label 999999999 \(row 1\)"),
    "labels": ((ROWS, [1, 2]), "3 images but 2 labels"),
    "words": ((ROWS, ["a", "b", "c"]), "as `labels`, not a list of whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["npz", 4])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_no_official_file_holds_is_named(tmp_path: Path, wrong: str, form: Any) -> None:
    (rows, labels), message = WRONG[wrong]
    path = write(tmp_path / "val_data", rows, labels, form)
    with pytest.raises(DataError, match=message):
        open_source(path)


def test_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    official(tmp_path)
    (tmp_path / "train_data_batch_2").rename(tmp_path / "train_data_batch_5")
    with pytest.raises(DataError, match="holds train_data_batch_5 but not train_data_batch_2: put all"):
        open_source(tmp_path)
    (tmp_path / "train_data_batch_5").rename(tmp_path / "train_data_batch_2")
    write(tmp_path / "val_data", np.zeros((2, 3072), np.uint8), [1, 1])
    with pytest.raises(DataError, match=r"val_data holds rows of 3,072 values, and .*train_data_batch_1 of 192"):
        open_source(tmp_path)
    write(tmp_path / "val_data", ROWS, None)
    with pytest.raises(DataError, match="val_data has no labels, the others have: give --labels none"):
        open_source(tmp_path)
    write(tmp_path / "val_data", ROWS, [1, 1, 1], "npz")
    with pytest.raises(DataError, match=r"val_data and val_data\.npz, the same images twice"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="--label-column labels has no effect on a folder of downsampled ImageNet"):
        open_source(tmp_path, label_column="labels")
    path = tmp_path / "others.npz"
    np.savez(path, data=ROWS, labels=[0, 1, 2])
    with pytest.raises(DataError, match=r"shape \(3, 192\), expected .* files called train_data_batch_N\.npz"):
        open_source(path)


class Planted:
    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sign}",)


@pytest.mark.case("H01")
def test_a_pickle_with_code_or_of_other_things_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "val_data", ROWS, [1, 2, 3], 4, more=Planted(tmp_path / "ran"))
    with pytest.raises(DataError, match="system, which could run code: only arrays are read"):
        open_source(path)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(pickle.dumps([ROWS]))
    with pytest.raises(DataError, match="a pickle of a value of type list, not of a dictionary"):
        open_source(path)
    path.write_bytes(b"\x80\x04]" + b"]a" * 100)
    with pytest.raises(DataError, match=r"cannot read .*val_data as a pickle of images: "):
        open_source(path)
