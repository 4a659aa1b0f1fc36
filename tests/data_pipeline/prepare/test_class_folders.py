"""Folders of images in any format that is read, and classes that would be gone without a word."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.prepare.sources import open_source
from tarflow.data_pipeline.prepare.write import Options, prepare


@pytest.fixture
def photos(tmp_path: Path, lab: SimpleNamespace) -> Path:
    root = tmp_path / "photos"
    for name, format, extension in (
        ("a", "PNG", "png"),
        ("b", "AVIF", "AVIF"),
        ("c", "TGA", "tga"),
        ("d", "JPEG2000", "jp2"),
    ):
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"{i}.{extension}").write_bytes(lab.image_bytes(i, format=format))
    return root


@pytest.mark.case("F11")
def test_class_folders_of_any_format_that_is_read(photos: Path, tmp_path: Path) -> None:
    source = open_source(photos)
    assert (source.classes, source.labels.tolist()) == (["a", "b", "c", "d"], [0, 0, 1, 1, 2, 2, 3, 3])
    report = prepare(source, tmp_path / "out", Options(size=8))
    assert report.written == {"": 8}
    assert not report.skipped


@pytest.mark.case("F11")
def test_a_class_of_pictures_that_are_not_read_is_an_error(photos: Path) -> None:
    (photos / "e").mkdir()
    for name in ("1.heic", "2.HEIC", "3.jxl", "note.txt"):
        (photos / "e" / name).write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"class folder .*/e would end without a single image: 2 \.heic, 1 \.jxl cannot"
    ):
        open_source(photos)
    (photos / "e" / "4.png").write_bytes((photos / "a" / "0.png").read_bytes())
    source = open_source(photos)  # one image: the class is there, and the rest is counted by name
    assert source.classes == ["a", "b", "c", "d", "e"]
    assert source.ignored == {"unreadable_heic": 2, "unreadable_jxl": 1, "not_an_image": 1}


@pytest.mark.case("F11")
def test_folders_without_pictures_are_named(photos: Path, tmp_path: Path) -> None:
    (photos / "notes").mkdir()
    (photos / "notes" / "a.txt").write_text("x")
    (photos / "empty").mkdir()
    report = prepare(open_source(photos), tmp_path / "out", Options(size=8))
    text = "\n".join(report.lines())
    assert "folder without images 'empty' 1" in text
    assert "folder without images 'notes' 1" in text


@pytest.mark.case("F11")
def test_a_class_that_damage_empties_is_named(photos: Path, tmp_path: Path) -> None:
    for file in (photos / "c").iterdir():
        file.write_bytes(b"x")
    report = prepare(open_source(photos), tmp_path / "out", Options(size=8, on_error="skip"))
    assert "1 classes without a single image: c" in report.lines()


@pytest.mark.case("F11")
def test_a_folder_of_nothing_that_is_read_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("1.heic", "2.heic", "a.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no images \(not_an_image 1, unreadable_heic 2\)"):
        open_source(tmp_path)


@pytest.mark.case("F19")
def test_images_beyond_the_bound_are_left_out_or_named(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"8 x 8, 64 pixels, and at most 63 are decoded .*--max-pixels.*--on-error skip"
    ):
        prepare(open_source(photos), tmp_path / "out", Options(size=8, max_pixels=63))
    with pytest.raises(DataError, match="--max-pixels cannot be 0"):
        Options(size=8, max_pixels=0).check()
