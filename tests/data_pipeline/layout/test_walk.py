"""Folders of links, links in circles, and every place that walks through folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.patterns import find_shards
from tarflow.data_pipeline.layout import walk as walking
from tarflow.data_pipeline.layout.walk import walk
from tarflow.data_pipeline.prepare.sources import open_source
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.folder import ImageFolder


@pytest.fixture
def pictures(tmp_path: Path, lab: SimpleNamespace) -> Callable[..., Path]:
    """`pictures("a/b", 2)` writes two images below the temporary folder and returns their folder."""

    def make(name: str, count: int = 1) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / f"{i}.png").write_bytes(lab.image_bytes(i))
        return folder

    return make


@pytest.mark.case("F05")
def test_linked_class_folders_count_as_real_ones(tmp_path: Path, pictures: Callable[..., Path]) -> None:
    pictures("set/cat", 2)
    (tmp_path / "set" / "dog").symlink_to(pictures("elsewhere/dogs", 3))
    (tmp_path / "set" / "eel").mkdir()
    (tmp_path / "set" / "eel" / "deep").symlink_to(pictures("elsewhere/eels"), target_is_directory=True)
    source = open_source(tmp_path / "set")
    assert source.classes == ["cat", "dog", "eel"]
    assert source.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert f"2 linked folders followed, first: {tmp_path}/set/dog" in source.notes
    (tmp_path / "all").symlink_to(tmp_path / "set")
    assert len(open_source(tmp_path / "all")) == 6


@pytest.mark.case("F05")
def test_linked_files_count_and_dangling_ones_are_counted(tmp_path: Path, pictures: Callable[..., Path]) -> None:
    real = pictures("real", 2)
    folder = pictures("set/cat", 0)
    (folder / "a.png").symlink_to(real / "0.png")
    (folder / "gone.png").symlink_to(real / "9.png")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.png")
    source = open_source(tmp_path / "set")
    assert (len(source), dict(source.ignored)) == (1, {"broken_link": 2, "not_a_file": 1})


@pytest.mark.case("F05")
def test_loops_end_and_a_folder_counts_once(tmp_path: Path, pictures: Callable[..., Path]) -> None:
    cat = pictures("set/cat", 2)
    (cat / "up").symlink_to(tmp_path / "set")
    (cat / "here").symlink_to(".")
    found = walk(tmp_path / "set")
    assert [path.name for path in found.files] == ["0.png", "1.png"]
    assert (dict(found.ignored), found.again) == ({"link_loop": 2}, [])
    assert len(open_source(tmp_path / "set")) == 2
    (tmp_path / "set" / "dog").symlink_to(cat)
    with pytest.raises(DataError, match=r"set/dog and .*set/cat are one folder, whose images would count twice"):
        open_source(tmp_path / "set")


@pytest.mark.case("F05")
def test_many_folders_that_link_to_each_other_are_walked_once(tmp_path: Path, pictures: Callable[..., Path]) -> None:
    folders = [pictures(f"set/{i:02d}") for i in range(12)]
    for folder in folders:
        for other in folders:
            (folder / f"to-{other.name}").symlink_to(other)
    assert len(walk(tmp_path / "set").files) == 12


@pytest.mark.case("F05")
def test_tars_below_a_linked_folder_are_shards(tmp_path: Path, lab: SimpleNamespace) -> None:
    lab.write_shards(tmp_path / "far", [1, 1])
    lab.write_shards(tmp_path / "set" / "near", [1])
    (tmp_path / "set" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "set" / "far again").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "set")
    shards, notes = find_shards(tmp_path / "set")
    assert notes == [
        f"1 linked folder followed, first: {tmp_path}/set/far", f"{tmp_path}/set/far again is the folder {tmp_path}/set/far: it counts once"
    ]  # fmt: skip
    assert shards == sorted([*(tmp_path / "far").glob("*.tar"), *(tmp_path / "set" / "near").glob("*.tar")])
    assert find_shards(f"{tmp_path}/set/**/*.tar") == (shards, notes)
    assert find_shards(f"{tmp_path}/s?t/**/near/**/shard-*0.tar")[0] == shards[-1:]
    assert find_shards(f"{tmp_path}/*/shard-0001.tar")[0] == shards[1:2]
    with pytest.raises(DataError, match="matches no file"):
        find_shards(f"{tmp_path}/set/**/near")


@pytest.mark.case("F05")
def test_score_follows_links_too(tmp_path: Path, pictures: Callable[..., Path]) -> None:
    pictures("samples", 2)
    more = pictures("more", 3)
    (tmp_path / "samples" / "linked").symlink_to(more)
    (more / "loop").symlink_to(tmp_path / "samples")
    folder = ImageFolder(tmp_path / "samples", 3, None)
    assert sum(len(batch) for batch in folder.batches()) == 5
    assert folder.describe()["linked_folders"] == 1
    (tmp_path / "samples" / "twice").symlink_to(more)
    with pytest.raises(EvaluationError, match="are the same folder, and its images would count twice"):
        ImageFolder(tmp_path / "samples", 3, None)


def test_a_folder_that_cannot_be_read_is_an_error_not_a_gap(
    tmp_path: Path, pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures("set/cat")
    closed = pictures("set/dog")
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(walking.os, "scandir", refusing)
    with pytest.raises(DataError, match=r"cannot read the folder .*set/dog: Permission denied"):
        open_source(tmp_path / "set")


def test_the_order_is_that_of_the_paths(tmp_path: Path) -> None:
    for name in ("b/1", "a.b/2", "a/3", "a/b/4", "a0/5", "6", ".hidden/7", ".hidden/deep/8", "a/.9"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = walk(tmp_path)
    assert found.files == sorted(p for p in tmp_path.rglob("*") if p.is_file() and "/." not in str(p))
    assert found.ignored == {"hidden": 3}
