"""A user's own data: the forms that images and labels may have, what is wrong said with the user's line, whose code is run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow.cli import main
from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.loading.custom.code import Named
from tarflow.data_pipeline.loading.custom.dataset import CustomDataset, open_dataset
from tarflow.data_pipeline.loading.custom.pixels import to_pixels
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.survey import survey
from tests.helpers import own_data

HERE = "tests.helpers.own_data"


def opened(function: str, place: str = "train") -> CustomDataset:
    return open_dataset(Named(f"{HERE}:{function}"), place)


def settings(function: str, place: str = "train", **more: object) -> DataSettings:
    return DataSettings.of(place, dataset=f"{HERE}:{function}", **more)


def test_an_image_in_any_form_is_the_same_pixels() -> None:
    data = opened("forms")
    expected = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)
    for number in range(len(data.data)):
        pixels, label = data.read(number, 3)
        np.testing.assert_array_equal(pixels, expected, err_msg=str(number))
        assert label == number
    grey, _ = data.read(0, 1)
    assert grey.shape == (5, 6, 1)


def test_where_both_axes_could_be_channels_arrays_and_tensors_differ_as_documented() -> None:
    odd = np.arange(45, dtype=np.uint8).reshape(3, 5, 3)
    np.testing.assert_array_equal(to_pixels(odd, 3, 100), odd)
    np.testing.assert_array_equal(to_pixels(torch.from_numpy(odd), 3, 100), odd.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"image": 1, "label": 2}, "pair (image, label), not a dictionary with 'image', 'label'"),
        (np.zeros((8, 8), np.uint8), "pair (image, label), not numpy.ndarray"),
        (("cat.png", 0), "must be a PIL image, or an array or tensor of uint8, not str"),
        ((np.zeros((8, 8)), 0), "the image is of float64; it must be uint8, 0 to 255"),
        ((torch.zeros(3, 8, 8), 0), "the image is of float32"),
        ((np.zeros((8, 8, 2), np.uint8), 0), "the image has the shape [8, 8, 2]"),
        ((np.zeros((0, 8), np.uint8), 0), "the image has the shape [0, 8]"),
        ((np.zeros((8, 8), np.uint8), "cat"), "a label must be a whole number, or None for no label, not str"),
        ((np.zeros((8, 8), np.uint8), True), "not bool"),
        ((np.zeros((8, 8), np.uint8), 1.0), "not float"),
        ((np.zeros((8, 8), np.uint8), -2), "the label is -2"),
        ((np.zeros((8, 8), np.uint8), 10**7), "the label is 10000000"),
        ((np.zeros((99, 99), np.uint8), 0), "99 x 99, 9,801 pixels, and at most 9,000"),
    ],
)
def test_an_item_that_cannot_be_used_is_said_with_function_and_number(item: object, said: str) -> None:
    data = opened("Spots")
    data.data = own_data.Items([item])
    with pytest.raises(BadSampleError) as error:
        data.read(0, 3, 9000)
    assert str(error.value).startswith(f"data.dataset={HERE}:Spots: image 0: ")
    assert said in str(error.value)


def test_labels_of_every_kind_of_integer() -> None:
    data = opened("Spots")
    image = np.zeros((8, 8), np.uint8)
    labels = [7, np.int32(7), np.array(7), torch.tensor(7), None, -1, torch.tensor(-1)]
    data.data = own_data.Items([(image, label) for label in labels])
    assert [data.read(n, 1)[1] for n in range(len(labels))] == [7, 7, 7, 7, None, None, None]


def test_what_the_users_code_raises_is_one_line_with_the_users_own_line() -> None:
    with pytest.raises(BadSampleError) as error:
        opened("Broken").read(5, 3)
    said = str(error.value)
    assert said.startswith(f"data.dataset={HERE}:Broken: image 5: KeyError: 'no such picture' (")
    assert "own_data.py, line " in said
    assert 'raise KeyError("no such picture")' in said
    assert "\n" not in said
    assert error.value.__cause__ is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tests.helpers.own_data:Spot", "has no Spot; it has Spots"),
        ("tests.helpers.own_dat:Spots", "there is no module tests.helpers.own_dat on Python's path"),
        ("nowhere.at_all:Spots", "there is no module nowhere on Python's path"),
        ("nowhere.py:Spots", "there is no file "),
        ("tests.helpers.own_data:no_argument", "called with 'train' (data.train or data.validation): TypeError: no_argument()"),
        ("tests.helpers.own_data:not_a_set", "something with __len__ and __getitem__; int has no __len__"),
        ("tests.helpers.own_data:empty", "the data set at 'train' has 0 images"),
        ("tests.helpers.own_data:FORMS", "it is a list, and must be a function or a class"),
    ],
)  # fmt: skip
def test_a_function_that_gives_no_data_set_is_named(name: str, said: str) -> None:
    with pytest.raises(DataError) as error:
        open_dataset(Named(name), "train")
    assert str(error.value).startswith(f"data.dataset={name}: ")
    assert said in str(error.value)


def test_a_module_that_fails_while_it_is_imported_is_said_with_its_line(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "slipped.py").write_text("import json\nx = 1 / 0\n")
    (tmp_path / "unclosed.py").write_text("def f(:\n")
    (tmp_path / "needs.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    for module, said in (
        ("slipped", f"ZeroDivisionError: division by zero ({tmp_path / 'slipped.py'}, line 2: x = 1 / 0)"),
        ("unclosed", "SyntaxError: invalid syntax"),
        ("needs", "No module named 'not_installed_anywhere'"),
    ):  # fmt: skip
        with pytest.raises(DataError) as error:
            open_dataset(Named(f"{module}.py:f"), "train")
        assert f"data.dataset={module}.py:f: importing {module}.py: " in str(error.value)
        assert said in str(error.value)
    with pytest.raises(DataError, match=r"install it, set PYTHONPATH, or name its file: data.dataset=slipped.py:f"):
        open_dataset(Named("slipped:f"), "train")


def test_the_fingerprint_knows_length_pixels_labels_and_names() -> None:
    same = {opened("Spots").fingerprint for _ in range(2)}
    assert len(same) == 1
    changed = [opened("Spots", place) for place in ("train-95", "held-96")] + [opened("Spots") for _ in range(2)]
    changed[2].data.labels = (changed[2].data.labels + 1) % 3
    changed[3].classes = ["left", "middle", "up"]
    assert len({data.fingerprint for data in changed} | same) == 5
    assert opened("Spots").fingerprint.startswith("custom-96-")


def test_data_that_are_other_images_when_read_again_are_refused() -> None:
    with pytest.raises(DataError, match=r"Restless: image 0 is another one when it is read again.*data.transform"):
        survey(settings("Restless"))


def test_a_survey_says_what_is_known() -> None:
    seen = survey(settings("Spots"))
    assert str(seen) == "96 images, 8 x 8, grey, 3 classes"
    assert seen.classes == ["left", "middle", "right"]
    record = seen.describe()
    assert record["place"] == f"{HERE}:Spots('train')"
    code = record["dataset"]
    assert isinstance(code, dict)
    assert code["file"] == own_data.__file__
    assert len(code["digest"]) == 16
    with pytest.raises(DataError, match="image 5: KeyError"):
        survey(settings("Broken", "train-6"))
    assert len(survey(settings("Broken", "train-6", on_error="skip")).looks) == 5


def test_code_that_nobody_has_named_in_person_is_not_imported(tmp_path: Path) -> None:
    """A configuration of a run names it: nothing happens, until the same name is given."""
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    name = f"{tmp_path / 'strange.py'}:f"
    for setting in ("dataset", "transform"):
        found = DataSettings.model_validate({"train": "train", setting: name})
        with pytest.raises(DataError, match=rf"data.{setting}=.* may come from anyone, .* add data.{setting}="):
            survey(found)
    assert not (tmp_path / "ran").exists()
    found.allow_code("transform")
    other = settings("Spots")
    found.allow_code_of(other)
    with pytest.raises(DataError, match="has no f"):
        survey(found.model_copy(update={"dataset": other.dataset}))
    assert (tmp_path / "ran").exists()


def test_info_shows_what_a_function_gives_and_a_sheet_of_it(tmp_path: Path, capsys) -> None:
    sheet = tmp_path / "sheet.png"
    assert main(["data", "info", "train-40", "--dataset", f"{HERE}:Spots", "--sheet", str(sheet), "--count", "4"]) == 0
    said = capsys.readouterr().out
    assert f"{HERE}:Spots('train-40') of {own_data.__file__}" in said
    for line in ("samples      40", "image size   8 x 8 in 16 images looked at, grey", "labels       16 of these images with, 0",
                 "fingerprint  custom-40-", "classes      3: left, middle, right"):  # fmt: skip
        assert line in said
    assert Image.open(sheet).size == (132, 132)
    assert main(["data", "info", "train", "--dataset", f"{HERE}:Spots", "--allow-root", "s3://a"]) == 2
    assert "--dataset replaces: give one of the two" in capsys.readouterr().err


def test_settings_that_contradict_each_other_or_have_no_form() -> None:
    with pytest.raises(
        DataError, match=r"^data.reader=mds reads shards, and data.dataset=.*:Spots replaces them: set one"
    ):
        settings("Spots", reader="mds")
    for name in ("Spots", "a b:c", "m:", ":f", "m:f()", "../x:f", "m;import os:f"):
        with pytest.raises(DataError, match=r"it must have the form module:function or FILE.py:function"):
            DataSettings.of("train", dataset=name)
    assert DataSettings.of("train", dataset="~/x.py:f").dataset == f"{Path.home()}/x.py:f"
