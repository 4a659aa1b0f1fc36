"""The data against the model: one line says what was found; what contradicts is refused or said, naming both."""

from pathlib import Path

import pytest

from tarflow.errors import UserError
from tarflow.trainer.start.check import check_start
from tarflow.trainer.start.data import patience


def refused(config, run_dir: Path = Path("no/run")) -> str:
    with pytest.raises(UserError) as caught:
        check_start(config, run_dir, 1)
    return str(caught.value)


def lines(config, run_dir: Path = Path("no/run")) -> list[str]:
    return check_start(config, run_dir, 1).lines()


@pytest.mark.case("N02")
def test_one_line_says_what_the_data_are(make_set, make_config) -> None:
    data = make_set("pictures", labels=[0, 1, 2, 3] * 10, val=0.2)
    config = make_config(data / "train", data={"validation": str(data / "val")})
    assert lines(config) == ["data: 32 images, 8 x 8, RGB, 4 classes; held out: 8 images"]
    grey = make_config(
        make_set("grey", labels=None, channels=1, size=12, number=1000), model={"num_classes": 0, "in_channels": 1}
    )
    assert lines(grey)[0] == "data: 1,000 images, 12 x 12, grey, no labels"


@pytest.mark.case("N02")
def test_grey_training_on_colours_is_refused_unless_meant(make_set, make_config) -> None:
    data = make_set("pictures", val=0.4)
    both = {"validation": str(data / "val")}
    said = refused(make_config(data / "train", data=both, model={"in_channels": 1})).splitlines()
    assert said == [
        f"model.in_channels=1 (grey), but the images in {place} have colours: set model.in_channels=3, or data.accept=[grey] "
        "to turn them to grey"
        for place in (data / "train", data / "val")
    ]
    meant = lines(make_config(data / "train", data={**both, "accept": ["grey"]}, model={"in_channels": 1}))
    assert (
        f"note: model.in_channels=1 (grey), but the images in {data / 'train'} have colours: they are turned to grey"
        in meant
    )


@pytest.mark.case("N02")
def test_pictures_of_one_channel_stored_as_three_are_grey(tmp_path: Path, make_config) -> None:
    """`data prepare` stores what a folder holds as RGB: the pixels decide, not the file's mode."""
    import numpy as np
    from PIL import Image

    from tarflow.data_pipeline.prepare.sources import open_source
    from tarflow.data_pipeline.prepare.write import Options, prepare

    for k in range(6):
        place = tmp_path / "raw" / "ab"[k % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 40 * k, np.uint8)).save(place / f"{k}.png")
    prepare(open_source(tmp_path / "raw"), tmp_path / "set", Options(size=8))
    config = make_config(tmp_path / "set", model={"in_channels": 1, "num_classes": 2})
    assert lines(config)[0] == "data: 6 images, 8 x 8, grey, 2 classes"
    colour = lines(make_config(tmp_path / "set", model={"num_classes": 2}))
    assert (
        f"note: model.in_channels=3 (colour), but the images in {tmp_path / 'set'} are grey: model.in_channels=1 would do"
        in colour
    )


@pytest.mark.case("N02")
def test_the_number_of_classes_must_fit_or_be_meant(make_set, make_config) -> None:
    data = make_set("pictures")
    assert refused(make_config(data, model={"num_classes": 10})) == (
        f"model.num_classes=10, but the data in {data} have 4 classes: the others learn nothing; set model.num_classes=4, or "
        "data.accept=[spare_classes] if that is meant"
    )
    spare = lines(make_config(data, model={"num_classes": 10}, data={"accept": ["spare_classes"]}))
    assert f"note: model.num_classes=10, but the data in {data} have 4 classes: the others learn nothing" in spare
    assert (
        refused(make_config(data, model={"num_classes": 3}))
        == f"model.num_classes=3, but the data in {data} have 4 classes"
    )
    assert f"the data in {data} have 4 classes, and model.num_classes is not set" in refused(
        make_config(data, model={"num_classes": ...})
    )
    unconditional = lines(make_config(data, model={"num_classes": 0}))
    assert f"note: model.num_classes=0: the labels in {data} (4 classes) are not used" in unconditional
    plain = make_set("plain", labels=None)
    assert f"model.num_classes=4, but the data in {plain} have no labels" in refused(make_config(plain))


@pytest.mark.case("N02")
def test_enlarged_images_are_said(make_set, make_config) -> None:
    data = make_set("pictures")
    said = lines(make_config(data, model={"image_size": 16}))
    assert (
        f"note: model.image_size=16, but the shorter side of the images in {data} has 8 px: they are enlarged" in said
    )
    assert not any("enlarged" in line for line in lines(make_config(data, model={"image_size": 4})))


@pytest.mark.parametrize(
    ("train", "note"),
    [
        ({"noise_std": 0}, "train.noise_std=0: images of 8 bits have no density without noise"),
        ({"noise_std": 12}, "train.noise_std=12: in the model's range the grey levels span 2"),
        ({"global_batch_size": 16}, "train.global_batch_size=16, but"),
    ],
)
@pytest.mark.case("N02")
def test_odd_settings_of_the_training_are_said(make_set, make_config, train: dict[str, object], note: str) -> None:
    assert any(line.startswith(f"note: {note}") for line in lines(make_config(make_set("pictures"), train=train)))


@pytest.mark.case("N02")
def test_missing_held_out_images_are_said_with_those_that_lie_beside(make_set, make_config) -> None:
    data = make_set("pictures", val=0.4)
    said = lines(make_config(data / "train"))
    assert said[1] == (
        "note: data.validation is not set: bits per dimension of held-out images are not measured; "
        f"{data / 'val'} lies beside data.train"
    )


def test_images_of_several_sizes_and_a_missing_shard(make_set, make_config, tmp_path: Path) -> None:
    import io
    import tarfile

    from PIL import Image

    from tarflow.data_pipeline.index.build import build_index

    (tmp_path / "wild").mkdir()
    with tarfile.open(tmp_path / "wild" / "a.tar", "w") as tar:
        for k, (width, height) in enumerate([(9, 30), (20, 12), (40, 40)]):
            buffer = io.BytesIO()
            Image.new("RGB", (width, height), (200, 10, 10)).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{k}.png")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    build_index(tmp_path / "wild", [tmp_path / "wild" / "a.tar"])
    config = make_config(tmp_path / "wild", model={"num_classes": 0, "image_size": 10})
    said = lines(config)
    assert said[0] == "data: 3 images, of several sizes (shorter sides of 9 to 40 px), RGB, no labels"
    assert any("has 9 px and more: they are enlarged" in line for line in said)
    (tmp_path / "wild" / "a.tar").unlink()
    assert "a.tar" in refused(config)


def test_a_server_may_not_be_silent_for_longer_than_a_step(make_config) -> None:
    """Both settings are named; a folder on a disk has no such requests."""
    for place, slow, refused_ in (
        ("https://host/set", 60, True),
        ("https://host/set", 10, False),
        ("/data/set", 60, False),
    ):
        config = make_config(place, data={"timeout_s": slow, "retries": 9})
        found = [finding.text for finding in patience(config)]
        assert bool(found) == refused_
        for text in found:
            assert "data.timeout_s=60 x (1 + data.retries=9) = 600 s" in text
            assert "parallel.step_timeout_s=600" in text
