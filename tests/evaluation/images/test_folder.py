"""Scoring folders: what counts, what is listed, what is refused, and that pixels come out as they went in."""

import errno
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import tarflow.cli
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.images.folder import ImageFolder
from tarflow.evaluation.references import compute as storing
from tarflow.evaluation.references import make as making
from tarflow.evaluation.references.make import ReferenceRequest, make_reference
from tarflow.evaluation.samples.png_folder import save_png
from tarflow.evaluation.worker import score_folder as scoring
from tarflow.evaluation.worker.score_folder import ScoreRequest, score_folder
from tarflow.files import check_writable
from tarflow.models.config import TarFlowConfig
from tarflow.models.noise import to_pixels
from tarflow.records import read_object
from tests.helpers.features import NoSpatial

SHAPE = {
    "image_size": 8, "patch_size": 4, "in_channels": 1, "channels": 16, "num_blocks": 1, "layers_per_block": 1,
    "head_channels": 8,
}  # fmt: skip


class FakeFeatures(NoSpatial):
    """Means and spreads of eight stripes of an image: enough to tell folders apart."""

    sha256, preprocessing, dim, num_classes = "f00d", "none", 8, 0

    def __init__(self, name="fake", device="cpu", file=None):
        self.name, self.warnings = name, []

    def __call__(self, images):
        stripes = images.float().mean(dim=1).flatten(1).unflatten(1, (4, -1))
        return torch.cat([stripes.mean(2), stripes.std(2)], 1)


@pytest.fixture(autouse=True)
def _fake(monkeypatch):
    for module in (making, scoring):
        monkeypatch.setattr(module, "Features", FakeFeatures)


def noise(height, width, channels, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def mixed(tmp_path):
    """Everything that turns up in folders."""
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    Image.fromarray(noise(16, 16, 1)).save(folder / "grey.png")
    Image.fromarray(noise(20, 30, 4)).save(folder / "rgba.PNG")
    Image.fromarray(np.full((16, 16), 40_000, dtype=np.uint16)).save(folder / "deep.png")
    Image.fromarray(noise(24, 24, 3)).save(folder / "a.JPEG", "JPEG")
    Image.fromarray(noise(16, 16, 3, 1)).save(folder / "twin.png")
    Image.fromarray(noise(16, 16, 3, 2)).save(folder / "TWIN.PNG")
    Image.fromarray(noise(16, 16, 3, 3)).save(folder / "sub" / "inside.png")
    Image.fromarray(noise(16, 16, 3, 4)).save(folder / ".hidden" / "no.png")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "notes.txt").write_text("hello")
    whole = io.BytesIO()
    Image.fromarray(noise(16, 16, 3, 5)).save(whole, "PNG")
    (folder / "broken.png").write_bytes(whole.getvalue()[:200])
    return folder


def request(folder, **changes):
    values = {
        "folder": folder, "reference": None, "against": None, "size": None, "channels": None, "features": "fake",
        "features_file": None, "on_error": "strict", "out": None, "device": "cpu",
    }  # fmt: skip
    return ScoreRequest(**(values | changes))


@pytest.mark.case("S05")
def test_every_decodable_image_counts_once_and_the_rest_is_listed(mixed):
    folder = ImageFolder(mixed, 3, 16, "skip")
    images = torch.cat(list(folder.batches(3)))
    assert images.shape == (7, 3, 16, 16)
    about = folder.describe()
    assert (about["images"], about["broken_files"], about["other_files"]) == (7, 1, 1)
    assert about["broken"][0].startswith("broken.png: ")
    assert about["others"] == ["notes.txt"]
    assert (about["jpeg_files"], about["cropped_or_resized"]) == (1, 2)
    names = [path.name for path in folder.files]
    assert names == sorted(names, key=lambda n: "sub/" + n if n == "inside.png" else n)
    deep = images[[path.name for path in folder.files if path.name != "broken.png"].index("deep.png")]
    assert (deep == round(40_000 * 255 / 65535)).all()


@pytest.mark.case("S05")
def test_a_broken_image_is_an_error_unless_it_may_be_left_out(mixed):
    with pytest.raises(EvaluationError, match=r"broken\.png.*--on-error skip"):
        list(ImageFolder(mixed, 3, 16).batches())


def test_the_directory_of_a_run_is_no_folder_of_images(mixed):
    """Its pictures are grids and curves: a second RUN where DATA belongs was scored as 27 images."""
    (mixed / "run.json").write_text('{"run_id": "%s"}' % ("0" * 32))
    with pytest.raises(EvaluationError, match=r"is the directory of a run, whose pictures are grids.*--save png"):
        ImageFolder(mixed, 3, 16)
    ImageFolder(mixed / "sub", 3, 16)


@pytest.mark.case("S05")
def test_mixed_sizes_need_a_size_and_an_empty_folder_is_an_error(mixed, tmp_path):
    (mixed / "rgba.PNG").unlink()
    with pytest.raises(EvaluationError, match=r"is \d+ x \d+, the images before it are \d+ x \d+; give --size"):
        list(ImageFolder(mixed, 3, None, "skip").batches())
    with pytest.raises(EvaluationError, match="is not a folder"):
        ImageFolder(tmp_path / "none", 3, 16)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    with pytest.raises(EvaluationError, match=r"holds no readable image .*; 1 other files"):
        ImageFolder(tmp_path / "text", 3, 16)
    (tmp_path / "text" / "a.png").write_text("x")
    with pytest.raises(EvaluationError, match="none of the 1 images"):
        list(ImageFolder(tmp_path / "text", 3, 16, "skip").batches())


@pytest.fixture
def samples():
    """Float images on the edges of rounding: k / 255 +- 0.49 / 255, 0.9999, beyond the range."""
    rng = torch.Generator().manual_seed(0)
    grey = torch.randint(0, 256, (40, 3, 16, 16), generator=rng).float()
    images = (grey + (torch.rand(grey.shape, generator=rng) - 0.5) * 0.98) / 127.5 - 1
    images[0, 0, 0, :3] = torch.tensor([0.9999, 1.3, -1.3])
    return images


def write_pngs(folder, pixels):
    folder.mkdir()
    for i, image in enumerate(pixels):
        save_png(folder / f"{i:06d}.png", image)
    return folder


@pytest.mark.case("S04")
def test_memory_equals_png_exactly(samples, tmp_path):
    pixels = to_pixels(samples)
    assert pixels[0, 0, 0, :3].tolist() == [255, 255, 0]
    read = torch.cat(list(ImageFolder(write_pngs(tmp_path / "png", pixels), 3, None).batches()))
    assert torch.equal(read, pixels)


@pytest.mark.case("S04")
def test_jpegs_are_flagged_and_move_the_score(samples, tmp_path):
    pixels = to_pixels(samples)
    pngs = write_pngs(tmp_path / "png", pixels)
    (tmp_path / "jpeg").mkdir()
    for i, image in enumerate(pixels):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.save(tmp_path / "jpeg" / f"{i:06d}.png", "JPEG", quality=75)  # the ending lies
    same = score_folder(request(pngs, against=pngs), lambda _: None)
    lossy = score_folder(request(tmp_path / "jpeg", against=pngs), lambda _: None)
    assert same["fd_fake"] < 1e-6
    assert lossy["fd_fake"] > 1
    assert not any("JPEG" in line for line in same["warnings"])
    assert any("40 of 40 images" in line and "JPEG" in line for line in lossy["warnings"])


@pytest.mark.case("S04")
def test_both_sides_go_through_one_preprocessing_which_the_result_names(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "wide").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (60, 100, 3), dtype=np.uint8)).save(tmp_path / "wide" / f"{i}.png")
    result = score_folder(request(tmp_path / "wide", against=tmp_path / "wide", size=16), lambda _: None)
    assert result["fd_fake"] < 1e-6
    for side in ("images", "reference"):
        assert result[side]["cropped_or_resized"] == 12
        assert "largest centred square, bicubic with antialias" in result[side]["crop"]
    assert any("12 of 12 images" in line and "cropped or resized to 16" in line for line in result["warnings"])


def test_a_folder_is_scored_against_statistics_of_a_data_set(digit_like, tmp_path):
    where = str(digit_like / "train")
    wanted = ReferenceRequest(where, 8, 1, 0, "fake", None, tmp_path / "ref.npz", "strict", "cpu")
    reference = make_reference(wanted, lambda _: None)
    assert reference.statistics.count == 48
    folder = write_pngs(tmp_path / "png", torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8))
    out = tmp_path / "scores.json"
    result = score_folder(request(folder, reference=tmp_path / "ref.npz", out=out), lambda _: None)
    assert read_object(out) == result
    assert result["fd_fake"] > 1
    assert result["distance_stderr"] > 0
    assert {"kd_fake", "kernel_stderr", "precision", "recall", "density", "coverage"} <= result.keys()
    assert result["reference"]["fingerprint"] == reference.provenance["fingerprint"]
    assert result["kept_features"] == [20, 48]
    for change, message in (
        ({"size": 16}, "image_size: 8 in the file, 16 here"),
        ({"features": "other"}, "features: 'fake'"),
    ):
        with pytest.raises(EvaluationError, match=message):
            score_folder(request(folder, reference=tmp_path / "ref.npz", **change), lambda _: None)
    with pytest.raises(EvaluationError, match="either --reference FILE or --against FOLDER"):
        score_folder(request(folder), lambda _: None)


def test_both_verbs_as_typed(mixed, digit_like, tmp_path, capsys):
    out = tmp_path / "r.npz"
    assert (
        tarflow.cli.main(["reference", str(digit_like / "train"), "--size", "8", "--channels", "1", "--out", str(out)])
        == 0
    )
    assert "48 images, 8 features" in capsys.readouterr().out
    assert tarflow.cli.main(["score", str(mixed), "--reference", str(out), "--on-error", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "fd_efficientnet_lite0 " in printed
    assert "1 files in" in printed
    assert tarflow.cli.main(["score", str(mixed), "--reference", str(out)]) == 2
    assert "--on-error skip" in capsys.readouterr().err


def test_statistics_beside_the_data_serve_every_run_on_them(make_run, digit_like, fake_features, tmp_path, monkeypatch):
    import shutil

    from tarflow.evaluation.worker.follow import WorkerOptions, evaluate

    for module in (making, scoring):
        monkeypatch.setattr(module, "Features", fake_features)
    data = tmp_path / "data"
    shutil.copytree(digit_like, data)
    found = make_reference(
        ReferenceRequest(str(data / "train"), 8, 1, 0, "efficientnet_lite0", None, None, "strict", "cpu"),
        lambda _: None,
    )
    assert found.path.parent == data / "train"
    run_dir, _ = make_run(steps=(10,), data={"train": str(data / "train"), "validation": str(data / "val")})
    assert evaluate(run_dir, False, WorkerOptions(), lambda _: None).failed == {}
    result = json.loads((run_dir / "evals/images-000000000160/result.json").read_text())
    assert result["reference"]["file"] == found.path.name
    assert not list(run_dir.rglob("reference-*.npz"))
    assert "distance_stderr" in result
    assert "coverage" in result


# --- the same images on both sides -----------------------------------------------------------------------------------


@pytest.mark.case("V09")
def test_a_folder_against_itself_is_said_to_be_that(samples, tmp_path):
    pngs = write_pngs(tmp_path / "png", to_pixels(samples))
    lines: list[str] = []
    result = score_folder(request(pngs, against=pngs), lines.append)
    assert result["identical_images"] == 40
    assert any("40 of 40 images" in line and "pixel for pixel, among the reference's" in line for line in lines)
    assert any("suspiciously small: independent sets of 40 and 40 images" in line for line in lines)
    assert sum("suspiciously" in line for line in result["warnings"]) == 1


@pytest.mark.case("V09")
def test_some_copies_are_counted_and_independent_images_are_no_cause_for_suspicion(samples, tmp_path):
    pixels = to_pixels(samples)
    ours = write_pngs(tmp_path / "ours", pixels[:25])
    theirs = write_pngs(tmp_path / "theirs", pixels[20:])
    result = score_folder(request(ours, against=theirs), lambda _: None)
    assert result["identical_images"] == 5
    assert any("5 of 25 images" in line for line in result["warnings"])
    apart = score_folder(request(ours, against=write_pngs(tmp_path / "rest", pixels[25:])), lambda _: None)
    assert apart["identical_images"] == 0
    assert not any("suspiciously" in line or "pixel for pixel" in line for line in apart["warnings"])


@pytest.mark.case("V09")
def test_samples_that_are_training_images_are_counted(digit_like, tmp_path):
    where = str(digit_like / "train")
    make_reference(ReferenceRequest(where, 8, 1, 0, "fake", None, tmp_path / "r.npz", "strict", "cpu"), lambda _: None)
    data = ImageSet(DataSettings.of(where), TarFlowConfig(**SHAPE))
    training = torch.cat([pixels for pixels, _, _ in data.batches(False)])
    other = 255 - training[:7]
    folder = write_pngs(tmp_path / "png", torch.cat([training[:13], other]))
    result = score_folder(request(folder, reference=tmp_path / "r.npz"), lambda _: None)
    assert result["identical_images"] == 13
    with np.load(tmp_path / "r.npz") as file:  # as an earlier version wrote it: it cannot be told
        arrays = {name: file[name] for name in file.files if name not in ("hashes", "checksum")}
    np.savez(tmp_path / "r.npz", **arrays)
    assert score_folder(request(folder, reference=tmp_path / "r.npz"), lambda _: None)["identical_images"] is None


# --- formats, the bound, places that cannot be written ---------------------------------------------------------------


@pytest.mark.case("F11")
def test_every_format_that_is_read_is_scored_and_others_are_named(tmp_path):
    for extension, format in (("avif", "AVIF"), ("jp2", "JPEG2000"), ("tga", "TGA"), ("png", "PNG"), ("JPE", "JPEG")):
        Image.fromarray(noise(16, 16, 3)).save(tmp_path / f"a.{extension}", format)
    (tmp_path / "b.heic").write_bytes(b"x")
    (tmp_path / "c.JXL").write_bytes(b"x")
    folder = ImageFolder(tmp_path, 3, 16)
    assert len(torch.cat(list(folder.batches()))) == 5
    assert folder.describe()["unreadable_formats"] == {"heic": 1, "jxl": 1}
    assert any("images in unsupported formats (1 .heic, 1 .jxl): not scored" in line for line in folder.warnings())
    for path in folder.files:
        path.unlink()
    with pytest.raises(EvaluationError, match=r"holds no readable image .*; 2 other files, images .*1 \.heic"):
        ImageFolder(tmp_path, 3, 16)


@pytest.mark.case("F19")
def test_the_bound_holds_for_scores_and_references(mixed, digit_like, tmp_path):
    with pytest.raises(EvaluationError, match=r"at most 255 are decoded .*--max-pixels"):
        score_folder(request(mixed, against=mixed, size=16, max_pixels=255), lambda _: None)
    folder = ImageFolder(mixed, 3, 16, "skip", 256)
    assert len(torch.cat(list(folder.batches()))) == 5  # two are larger, one is broken
    assert sum("at most 256 are decoded" in line for line in folder.broken) == 2
    wanted = ReferenceRequest(
        str(digit_like / "train"), 8, 1, 0, "fake", None, tmp_path / "r.npz", "strict", "cpu", max_pixels=63
    )
    with pytest.raises(DataError, match=r"8 x 8, 64 pixels, and at most 63 are decoded"):
        make_reference(wanted, lambda _: None)


@pytest.mark.case("F17")
def test_reference_where_nothing_can_be_written_names_the_way_out(digit_like, tmp_path, monkeypatch):
    where = str(digit_like / "train")
    before = sorted((digit_like / "train").rglob("*"))

    def refuse(folder):
        if folder == digit_like / "train":
            raise OSError(errno.EROFS, "Read-only file system")
        check_writable(folder)

    monkeypatch.setattr(storing, "check_writable", refuse)
    with pytest.raises(EvaluationError, match=r"cannot write .*Read-only file system; `tarflow reference --out FILE`"):
        make_reference(ReferenceRequest(where, 8, 1, 0, "fake", None, None, "strict", "cpu"), lambda _: None)
    assert sorted((digit_like / "train").rglob("*")) == before
    out = tmp_path / "new" / "r.npz"
    make_reference(ReferenceRequest(where, 8, 1, 0, "fake", None, out, "strict", "cpu"), lambda _: None)
    assert out.is_file()
    for wrong, error in ((tmp_path, EvaluationError), (out / "x.npz", OSError)):  # the front door names the option
        with pytest.raises(error, match="is a folder: name the file" if error is EvaluationError else "r.npz"):
            make_reference(ReferenceRequest(where, 8, 1, 0, "fake", None, wrong, "strict", "cpu"), lambda _: None)


@pytest.mark.case("F17")
def test_reference_of_data_behind_an_address_needs_a_place(tmp_path, monkeypatch):
    """It went into a folder called `http:` in the current one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaluationError, match=r"http://127.* is an address, .*--out FILE"):
        make_reference(
            ReferenceRequest("http://127.0.0.1:9/set", 8, 1, 0, "fake", None, None, "strict", "cpu"), lambda _: None
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.case("H10")
@pytest.mark.parametrize("name", ["0.png", "0.bmp", "0.jpg"])
def test_a_file_larger_than_any_image_is_named_and_not_read(mixed, name):
    with (mixed / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(EvaluationError, match=rf"{name}: the file has 1,099,511,627,776 bytes, an image at most"):
        list(ImageFolder(mixed, 3, 16).batches())
