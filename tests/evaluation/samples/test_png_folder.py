"""Folders of samples: exactly as many as asked for, continued or refused, never mixed."""

import json
import os

import pytest
import torch
from PIL import Image

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.png_folder import SampleFolder, load_png, save_png
from tarflow.records import DamagedFileError

SETTINGS = {"weights_sha256": "abc", "sampling": {"guidance": 2.0, "seed": 0}}


def image(index, channels=1):
    return torch.full((channels, 4, 4), index, dtype=torch.uint8)


def fill(folder, indices=None):
    for index in folder.missing() if indices is None else indices:
        folder.save(index, image(index))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.case("S04")
def test_a_png_holds_the_pixels_exactly(tmp_path, channels):
    pixels = torch.randint(0, 256, (channels, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_png(tmp_path / "a.png", pixels)
    assert torch.equal(load_png(tmp_path / "a.png"), pixels)
    assert Image.open(tmp_path / "a.png").mode == ("L" if channels == 1 else "RGB")


@pytest.mark.case("S02")
def test_the_folder_holds_exactly_the_samples_asked_for(tmp_path):
    folder = SampleFolder(tmp_path / "out", SETTINGS, 10)
    assert folder.missing() == list(range(10))
    fill(folder)
    folder.finish([])
    assert sorted(p.name for p in (tmp_path / "out/images").iterdir()) == [f"{i:06d}.png" for i in range(10)]
    assert json.loads((tmp_path / "out/settings.json").read_text())["complete"] is True


@pytest.mark.case("S02")
def test_a_killed_run_goes_on_with_what_is_missing(tmp_path):
    fill(SampleFolder(tmp_path / "out", SETTINGS, 10), [0, 1, 2, 7])
    (tmp_path / "out/images/.000003.png.99.tmp").write_bytes(b"half")
    again = SampleFolder(tmp_path / "out", SETTINGS, 10)
    assert again.missing() == [3, 4, 5, 6, 8, 9]
    assert len(list((tmp_path / "out/images").iterdir())) == 4
    assert SampleFolder(tmp_path / "out", SETTINGS, 12).missing() == [3, 4, 5, 6, 8, 9, 10, 11]


@pytest.mark.case("S02")
def test_fewer_than_there_are_is_refused(tmp_path):
    fill(SampleFolder(tmp_path / "out", SETTINGS, 10))
    with pytest.raises(EvaluationError, match=r"holds sample 5, beyond the 5 requested; ask for --num 6 or more"):
        SampleFolder(tmp_path / "out", SETTINGS, 5)
    assert len(list((tmp_path / "out/images").iterdir())) == 10


@pytest.mark.case("S02")
def test_samples_of_other_settings_are_refused_and_left_alone(tmp_path):
    fill(SampleFolder(tmp_path / "out", SETTINGS, 3))
    other = SETTINGS | {"weights_sha256": "def"}
    with pytest.raises(EvaluationError, match=r"other settings \(weights_sha256: 'abc' there, 'def' asked\)"):
        SampleFolder(tmp_path / "out", other, 3)
    assert len(list((tmp_path / "out/images").iterdir())) == 3


@pytest.mark.case("S02")
def test_foreign_images_and_folders_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/holiday.jpg").write_bytes(b"x")
    with pytest.raises(EvaluationError, match="not empty and not a folder of samples"):
        SampleFolder(tmp_path / "mine", SETTINGS, 3)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["holiday.jpg"]
    fill(SampleFolder(tmp_path / "out", SETTINGS, 3))
    (tmp_path / "out/images/extra.png").write_bytes(b"x")
    with pytest.raises(EvaluationError, match=r"holds extra\.png, which is not a sample"):
        SampleFolder(tmp_path / "out", SETTINGS, 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="is a file; give a directory"):
        SampleFolder(tmp_path / "file", SETTINGS, 3)


def test_damaged_settings_are_refused(tmp_path):
    SampleFolder(tmp_path / "out", SETTINGS, 3)
    (tmp_path / "out/settings.json").write_text("{")
    with pytest.raises(
        DamagedFileError,
        match=r"settings\.json \(settings of samples\) is damaged .*not JSON.*give a new --out directory",
    ):
        SampleFolder(tmp_path / "out", SETTINGS, 3)


@pytest.mark.case("S03")
def test_missing_samples_are_recorded(tmp_path):
    folder = SampleFolder(tmp_path / "out", SETTINGS, 3)
    fill(folder, [0, 2])
    folder.finish([1])
    assert json.loads((tmp_path / "out/settings.json").read_text())["nonfinite"] == [1]
    assert SampleFolder(tmp_path / "out", SETTINGS, 3).missing() == [1]


def damage(path, how):
    data = path.read_bytes()
    new = {
        "empty": b"",
        "half": data[: len(data) // 2],
        "without its last byte": data[:-1],
        "zeros at the end": data[:-20] + bytes(20),
        "a flipped bit": data[:45] + bytes([data[45] ^ 4]) + data[46:],
        "not a PNG": b"<html>not found</html>",
    }[how]
    path.write_bytes(new)


@pytest.mark.parametrize(
    "how", ["empty", "half", "without its last byte", "zeros at the end", "a flipped bit", "not a PNG"]
)
@pytest.mark.case("V06")
def test_a_damaged_image_counts_as_missing(tmp_path, how):
    fill(SampleFolder(tmp_path / "out", SETTINGS, 5, (1, 4, 4)))
    damage(tmp_path / "out/images/000003.png", how)
    again = SampleFolder(tmp_path / "out", SETTINGS, 5, (1, 4, 4))
    assert again.missing() == list(again.damaged) == [3]
    fill(again)
    assert again.missing() == []
    assert torch.equal(load_png(again.path(3)), image(3))


@pytest.mark.case("V06")
def test_an_image_of_another_size_or_colour_counts_as_missing(tmp_path):
    fill(SampleFolder(tmp_path / "out", SETTINGS, 4, (1, 4, 4)))
    save_png(tmp_path / "out/images/000001.png", torch.zeros(1, 4, 5, dtype=torch.uint8))
    save_png(tmp_path / "out/images/000002.png", image(2, channels=3))
    again = SampleFolder(tmp_path / "out", SETTINGS, 4, (1, 4, 4))
    assert again.missing() == [1, 2]
    assert again.damaged[1] == "5 x 4 pixels, 1 channels, instead of 4 x 4, 1"


@pytest.mark.case("H06")
def test_another_picture_in_a_samples_place_is_drawn_again(tmp_path):
    fill(SampleFolder(tmp_path / "out", SETTINGS, 4, (1, 4, 4)))
    SampleFolder(tmp_path / "out", SETTINGS, 4, (1, 4, 4)).finish([])
    assert SampleFolder(tmp_path / "out", SETTINGS, 5, (1, 4, 4)).damaged == {}
    save_png(tmp_path / "out/images/000001.png", image(3))
    again = SampleFolder(tmp_path / "out", SETTINGS, 4, (1, 4, 4))
    assert again.missing() == [1]
    assert again.damaged == {1: "not the picture that was drawn"}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nothing", path)])
@pytest.mark.case("H06")
def test_settings_that_are_no_file_are_refused_and_nothing_waits(tmp_path, make):
    fill(SampleFolder(tmp_path / "out", SETTINGS, 4))
    (tmp_path / "out/settings.json").unlink()
    make(tmp_path / "out/settings.json")
    with pytest.raises(DamagedFileError, match="not a regular file; give a new --out directory"):
        SampleFolder(tmp_path / "out", SETTINGS, 4)


@pytest.mark.case("V06")
def test_nothing_is_touched_in_a_folder_that_is_refused(tmp_path):
    fill(SampleFolder(tmp_path / "out", SETTINGS, 4, (1, 4, 4)))
    damage(tmp_path / "out/images/000001.png", "half")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    with pytest.raises(EvaluationError, match="other settings"):
        SampleFolder(tmp_path / "out", SETTINGS | {"weights_sha256": "def"}, 4, (1, 4, 4))
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.*")} == before
    (tmp_path / "out/images/000001.png").unlink()
    (tmp_path / "out/images/000001.png").mkdir()
    with pytest.raises(EvaluationError, match=r"000001\.png cannot be read: it is not a regular file"):
        SampleFolder(tmp_path / "out", SETTINGS, 4, (1, 4, 4))


@pytest.mark.case("V06")
def test_a_damaged_image_of_a_sample_that_is_lost_does_not_stay(tmp_path):
    fill(SampleFolder(tmp_path / "out", SETTINGS, 3))
    damage(tmp_path / "out/images/000001.png", "half")
    again = SampleFolder(tmp_path / "out", SETTINGS, 3)
    again.finish([1])
    assert not again.path(1).exists()
