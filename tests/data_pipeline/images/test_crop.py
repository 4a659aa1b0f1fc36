"""Crops by rule: each equals its source's definition, written here once more; random ones are keyed; a set says its rule."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import tarflow.cli
from tarflow.data_pipeline import keyed
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.crop import LEAST_AREA, SHAPES, Crop, random_box
from tarflow.data_pipeline.images.decode import decode
from tarflow.data_pipeline.images.transform import fit
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.evaluation_batches import evaluation_batches
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import ImageShape
from tarflow.image_size import Size, parse_size, plain, shown, sides, size_of
from tests.helpers.loaders import make_loader

Pixels = NDArray[np.uint8]
SHAPES_IN = [(37, 61), (61, 37), (16, 16), (200, 90), (9, 70), (33, 32)]


def scene(height: int, width: int, channels: int = 3) -> Pixels:
    """Slopes, an edge and grain: nothing that two rules would cut alike."""
    y, x = np.mgrid[:height, :width]
    grain = np.random.default_rng(height).integers(0, 40, (height, width, channels))
    slopes = np.stack([200 * y / height, 200 * x / width, 180 * (x > width // 3)], axis=2)[..., :channels]
    return (slopes + grain).astype(np.uint8)


def of_adm(image: Pixels, size: int) -> Pixels:
    """Halve while the shorter side has twice the size, by boxes; to the size by its shorter side; the middle."""
    picture = Image.fromarray(image)
    while min(picture.width, picture.height) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    factor = size / min(picture.width, picture.height)
    to = (round(picture.width * factor), round(picture.height * factor))
    left, top = ((side - size) // 2 for side in to)
    return np.asarray(picture.resize(to, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size)))


def of_edm(image: Pixels, size: int) -> Pixels:
    """The middle square of the shorter side; Lanczos."""
    height, width = image.shape[:2]
    side = min(height, width)
    rows, columns = (slice((whole - side) // 2, (whole + side) // 2) for whole in (height, width))
    return np.asarray(Image.fromarray(image[rows, columns]).resize((size, size), Image.Resampling.LANCZOS))


def of_centre(image: Pixels, size: int) -> Pixels:
    """The middle square of the shorter side, resized in one step."""
    height, width = image.shape[:2]
    side, left, top = min(height, width), (width - min(height, width)) // 2, (height - min(height, width)) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))


@pytest.mark.parametrize(("rule", "definition"), [("adm", of_adm), ("edm", of_edm), ("centre", of_centre)])
def test_a_rule_equals_its_definition(rule: str, definition: Callable[[Pixels, int], Pixels]) -> None:
    for height, width in SHAPES_IN:
        for size in (8, 16, 40):
            image = scene(height, width)
            found = Crop(rule)(image, size)
            assert np.array_equal(found, definition(image, size)), (height, width, size)
            grey = Crop(rule)(image[..., :1], size)
            assert np.array_equal(grey, Crop(rule)(image[..., [0, 0, 0]], size)[..., :1])


def test_the_rules_differ_and_leave_an_image_of_the_size_alone() -> None:
    image = scene(61, 97)
    cut = [Crop(rule)(image, 16) for rule in ("centre", "adm", "edm")]
    assert all(not np.array_equal(a, b) for a, b in zip(cut, [*cut[1:], cut[0]]))
    for size in (16, (16, 24)):
        for rule in ("centre", "adm", "edm"):
            image = scene(*sides(size))
            assert np.array_equal(Crop(rule)(image, size), image)


@pytest.mark.parametrize("rule", ["centre", "adm", "edm"])
def test_a_rectangle_is_the_middle_of_its_shape(rule: str) -> None:
    """Upright, lying and too wide images; the same turned by 90 degrees; no part is stretched."""
    for height, width in SHAPES_IN:
        found = Crop(rule)(image := scene(height, width), (8, 12))
        assert found.shape == (8, 12, 3)
        turned = Crop(rule)(np.ascontiguousarray(image.transpose(1, 0, 2)), (12, 8))
        assert (
            np.abs(turned.transpose(1, 0, 2).astype(int) - found).mean() < 1
        )  # Pillow rounds between rows and columns
    ramp = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (40, 120, 1))
    across = Crop(rule)(ramp, (8, 12))[4, :, 0].astype(float)
    assert across.mean() == pytest.approx(119, abs=2)  # the middle ...
    assert np.diff(across)[2:-2].mean() == pytest.approx(2 * 40 / 8, abs=0.3)  # ... at the scale of its height


def test_a_photograph_is_reduced_while_it_is_decoded_only_as_far_as_both_sides_allow() -> None:
    for orientation, size in ((1, (40, 100)), (6, (100, 40))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        Image.fromarray(scene(320, 1600)).save(buffer, "JPEG", exif=exif, quality=90)
        decoded = decode(buffer.getvalue(), 3, size)
        assert decoded.shape[:2] == ((40, 200) if orientation == 1 else (200, 40))
        whole = fit(decode(buffer.getvalue(), 3), size)
        assert np.abs(fit(decoded, size).astype(int) - whole).mean() < 4


def test_a_random_crop_has_the_area_the_shape_and_the_place_that_its_definition_gives() -> None:
    """Against the numbers of its key, and over many keys against the ranges of its definition."""
    image = scene(60, 90)
    for size in (16, (16, 24)):
        wanted = sides(size)[1] / sides(size)[0]
        boxes = []
        for key in range(400):
            box = top, left, rows, columns = random_box(image, size, key)
            u = iter((keyed.bits(key, np.arange(40)) >> np.uint64(11)) / 2.0**53)
            for _ in range(10):
                area, shape, down, right = LEAST_AREA + (1 - LEAST_AREA) * next(u), next(u), next(u), next(u)
                shape = wanted * math.exp((2 * shape - 1) * math.log(4 / 3))
                h, w = round(math.sqrt(5400 * area / shape)), round(math.sqrt(5400 * area * shape))
                if h <= 60 and w <= 90:
                    assert box == (math.floor(down * (61 - h)), math.floor(right * (91 - w)), h, w)
                    break
            assert 0 <= top <= 60 - rows
            assert 0 <= left <= 90 - columns
            boxes.append(box)
        found = np.array(boxes, dtype=float)
        areas, shapes = found[:, 2] * found[:, 3] / 5400, found[:, 3] / found[:, 2] / wanted
        assert 0.06 < areas.min() < 0.15
        assert areas.max() > 0.8
        assert SHAPES[0] * 0.93 < shapes.min() < 0.85
        assert 1.2 < shapes.max() < SHAPES[1] * 1.07
        box = random_box(image, size, 7)
        top, left, rows, columns = box
        piece = Image.fromarray(image[top : top + rows, left : left + columns])
        again = piece.resize(sides(size)[::-1], Image.Resampling.BICUBIC)
        assert np.array_equal(_with_key(image, size, 7), np.asarray(again))
    for shape, expected in (((2, 300), (0, 148, 2, 3)), ((300, 2), (148, 0, 3, 2))):  # no try fits: the middle
        assert random_box(scene(*shape), 16, 3) == expected


def _with_key(image: Pixels, size: Size, key: int) -> Pixels:
    from tarflow.data_pipeline.images.crop import resized

    return resized(image, random_box(image, size, key), size)


# --- Where the rules act.


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    for number in range(12):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(scene(40 + number, 70)).save(tmp_path / "photos" / f"{number:02}.png")
    return tmp_path / "photos"


def prepare(source: Path, out: Path, *options: str) -> Path:
    assert tarflow.cli.main(["data", "prepare", str(source), str(out), "--labels", "none", *options]) == 0
    return out


def pixels_of(loader: Any, batches: int) -> dict[tuple[int, int], list[Pixels]]:
    """(epoch, image) -> what was delivered."""
    found: dict[tuple[int, int], list[Pixels]] = {}
    for _, batch in zip(range(batches), loader):
        for image, number, slot in zip(batch.images, batch.ids.tolist(), batch.slots.tolist()):
            found.setdefault(((batch.images_seen + slot) // 12, number), []).append(image.numpy().copy())
    return found


def test_random_crops_are_the_same_for_an_image_and_an_epoch_whatever_reads_them(
    photographs: Path, tmp_path: Path
) -> None:
    """On one rank, on two, with workers, and from the middle; another one in another epoch and with another seed."""
    out = prepare(photographs, tmp_path / "set", "--size", "40,60")
    options: dict[str, Any] = {"image_size": (8, 12), "global_batch_size": 6, "crop": "random"}
    with make_loader(out, **options) as loader:
        alone = pixels_of(loader, 8)
    assert len(alone) == 48
    for more in ({"world_size": 2, "rank": 1}, {"num_workers": 1}, {"images_seen": 18}):
        with make_loader(out, **(options | more)) as loader:
            others = pixels_of(loader, 5)
        for name in others.keys() & alone.keys():
            assert np.array_equal(others[name], alone[name]), (more, name)
        assert len(others.keys() & alone.keys()) >= 15
    assert all(not np.array_equal(alone[0, number], alone[1, number]) for number in range(12))
    with make_loader(out, **options, seed=1) as loader:
        reseeded = pixels_of(loader, 2)
    assert all(not np.array_equal(reseeded[name], alone[name]) for name in reseeded)
    held = [
        pixels
        for b in evaluation_batches(DataSettings.of(out, crop="random"), ImageShape((8, 12)), 12)
        for pixels in b.images
    ]
    centred = [pixels for b in evaluation_batches(DataSettings.of(out), ImageShape((8, 12)), 12) for pixels in b.images]
    assert all(np.array_equal(a, b) for a, b in zip(held, centred, strict=True))


@pytest.mark.parametrize("rule", ["adm", "edm", "centre"])
def test_preparing_crops_for_good_and_the_set_says_by_which_rule(
    photographs: Path, tmp_path: Path, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare(photographs, tmp_path / "set", "--size", "8,12", "--crop", rule)
    index = Index(out)
    assert (index.crop, index.image_size) == (rule, (12, 8))
    note = json.loads((out / "prepare.json").read_text())["options"]
    assert (note["crop"], note["size"]) == (rule, [8, 12])
    assert tarflow.cli.main(["data", "info", str(out), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert f"image size   8 x 12 (height x width), cropped by the rule {rule}" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > sheet.height  # tiles of the images' shape

    def images(size: Size, **settings: Any) -> list[Pixels]:
        batches = evaluation_batches(DataSettings.of(out, **settings), ImageShape(size), 12)
        return [np.asarray(image.permute(1, 2, 0)) for batch in batches for image in batch.images]

    originals = [np.asarray(Image.open(path)) for path in sorted(photographs.iterdir())]
    stored = images((8, 12))
    cut = {Crop(rule)(image, (8, 12)).tobytes() for image in originals}
    assert {image.tobytes() for image in stored} == cut
    # Read for a smaller model, they are cropped again, by the same rule unless another is set; never by one at odds.
    assert all(np.array_equal(a, Crop(rule)(b, 4)) for a, b in zip(images(4), stored, strict=True))
    other = "edm" if rule == "adm" else "adm"
    assert images((8, 12), crop=rule)
    for use in (
        lambda: images((8, 12), crop=other),
        lambda: make_loader(out, image_size=8, crop=other, global_batch_size=4),
    ):
        with pytest.raises(
            DataError, match=rf"^data\.crop={other}, but the images of .*set were cropped by the rule {rule} when"
        ):
            use()


def test_an_index_made_anew_keeps_size_and_rule_of_the_same_shards_and_says_when_it_cannot(
    photographs: Path, tmp_path: Path, lab: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepare(photographs, tmp_path / "set", "--size", "8,12", "--crop", "adm")
    before = Index(out)
    (out / before.shard_paths[0]).touch()
    assert tarflow.cli.main(["data", "index", str(out)]) == 0
    assert "the index before" not in capsys.readouterr().out
    again = Index(out)
    assert (again.crop, again.image_size, again.fingerprint) == ("adm", (12, 8), before.fingerprint)

    # Also beside another folder's shards, and with a new shard that holds nothing.
    lab.write_tar(out / "empty.tar", [])
    assert tarflow.cli.main(["data", "index", str(out), "--out", str(tmp_path / "elsewhere")]) == 0
    assert "the index before" not in capsys.readouterr().out
    elsewhere = Index(tmp_path / "elsewhere")
    assert (elsewhere.crop, elsewhere.image_size) == ("adm", (12, 8))
    (out / "empty.tar").unlink()

    # A shard of unknown origin beside them: nothing holds for all any more.
    buffer = io.BytesIO()
    Image.fromarray(scene(50, 90)).save(buffer, "PNG")
    lab.write_tar(out / "more.tar", [("0.png", buffer.getvalue())])
    assert tarflow.cli.main(["data", "index", str(out)]) == 0
    said = capsys.readouterr().out
    assert "all images are 8 x 12 (height x width), cropped by the rule adm; of these shards that is not known" in said
    mixed = Index(out)
    assert (mixed.crop, mixed.image_size) == (None, None)
    assert any("cropped by the rule adm" in line for line in mixed.meta["origin"])


def test_originals_that_are_only_indexed_are_cropped_as_they_are_read(tmp_path: Path, lab: Any) -> None:
    from tarflow.data_pipeline.index.build import build_index

    members = []
    for number in range(6):
        buffer = io.BytesIO()
        Image.fromarray(scene(50, 90 + number)).save(buffer, "JPEG", quality=95)
        members.append((f"{number}.jpg", buffer.getvalue()))
    lab.write_tar(tmp_path / "a.tar", members)
    build_index(tmp_path, [tmp_path / "a.tar"])
    for rule in ("adm", "edm"):
        (batch,) = evaluation_batches(DataSettings.of(tmp_path, crop=rule), ImageShape(8), 6)
        for image, (_, data) in zip(batch.images, members):
            assert np.array_equal(image.permute(1, 2, 0), Crop(rule)(decode(data, 3), 8)), "of the whole picture"
        with make_loader(tmp_path / "a.tar", reader="stream", image_size=8, global_batch_size=6, crop=rule) as loader:
            streamed = next(iter(loader))
        for image, row in zip(streamed.images, streamed.ids.tolist()):
            assert np.array_equal(image.permute(1, 2, 0), Crop(rule)(decode(members[row][1], 3), 8))
    with pytest.raises(
        DataError, match=r"data\.crop=random is keyed by epoch and image, which a stream .* does not know"
    ):
        make_loader(tmp_path / "a.tar", reader="stream", image_size=8, global_batch_size=6, crop="random")


# --- Sizes as text.


@pytest.mark.parametrize(("text", "size"), [("64", 64), ("8,12", (8, 12)), (" 8 , 8 ", 8), (16, 16)])
def test_a_size_is_read_as_it_is_written(text: str | int, size: Size) -> None:
    assert parse_size(text) == size == size_of(*sides(size)) == parse_size(plain(size))
    assert shown(size) == {64: "64 x 64", 8: "8 x 8", 16: "16 x 16"}.get(size, "8 x 12 (height x width)")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "8x12", "8,", "8,12,3", "-8", "1e3", "²", "9" * 30, "a,b"])
def test_what_is_no_size_is_said_in_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="is no size: give a whole number of pixels for squares, or HEIGHT,WIDTH"):
        parse_size(text)
    with pytest.raises(SystemExit):
        tarflow.cli.main(["data", "prepare", str(tmp_path), str(tmp_path / "out"), f"--size={text}"])
    assert "argument --size: " in capsys.readouterr().err
