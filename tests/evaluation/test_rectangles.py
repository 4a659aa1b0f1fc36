"""Images that are no squares, from pictures of several sizes to samples, likelihoods and a report, through the front door."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import tarflow
from tarflow.cli import main
from tarflow.data_pipeline.loading.evaluation_batches import evaluation_batches
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import ImageShape
from tests.helpers.ranks import launch_ranks

HEIGHT, WIDTH = 8, 12


def pictures(folder: Path) -> Path:
    """48 pictures of two sizes in 3 classes: a bright bar in one third of the width, above it a dark quarter."""
    rng = np.random.default_rng(0)
    for number in range(48):
        height, width = (40, 60) if number % 2 else (30, 70)
        pixels = rng.integers(0, 50, (height, width), dtype=np.uint8)
        third = number % 3
        pixels[height // 4 :, width * third // 3 : width * (third + 1) // 3] += 180
        (folder / f"bar{third}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"bar{third}" / f"{number:02}.png")
    return folder


def train(words: list[str]) -> int:
    """For `launch_ranks`."""
    return main(words)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks on what `data prepare` made of the pictures, with mirrored images."""
    home = tmp_path_factory.mktemp("rectangles")
    words = ["--size", f"{HEIGHT},{WIDTH}", "--val-fraction", "0.25", "--crop", "adm", "--channels", "1"]
    assert main(["data", "prepare", str(pictures(home / "pictures")), str(home / "set"), *words]) == 0
    assert main(["init", str(home / "set"), "--out", str(home / "suggested.yaml")]) == 0
    tree = {
        "data": {"train": str(home / "set/train"), "validation": str(home / "set/val")},
        "model": {"image_size": [HEIGHT, WIDTH], "patch_size": 2, "in_channels": 1, "channels": 32, "head_channels": 16,
                  "num_blocks": 2, "layers_per_block": 1, "num_classes": 3},
        "train": {"global_batch_size": 12, "max_images": 480, "noise_std": 0.1, "param_dtype": "float32"},
        "optim": {"lr": 5e-3, "warmup_images": 24}, "parallel": {"backend": "fsdp2"}, "checkpoint": {"every_images": 480},
        "log": {"every_steps": 10, "tensorboard": False}, "sampling": {"guidance": 1.0, "batch_size": 12, "denoise": 1.0},
        "evaluation": {"num_samples": 12, "grid": [3, 2]},
    }  # fmt: skip
    (home / "run.yaml").write_text(yaml.safe_dump(tree))
    command = ["train", str(home / "run.yaml"), "--run-dir", str(home / "run")]
    assert launch_ranks(train, 2, command).values == [0, 0]
    return home / "run"


@pytest.fixture
def evaluated(run: Path, fake_features: object) -> dict[str, object]:
    if not (run / "evals").exists():
        assert main(["evaluate", str(run)]) == 0
    found: dict[str, object] = json.loads((run / "evals/images-000000000480/result.json").read_text())
    return found


def test_a_run_records_its_shape_and_its_crop(run: Path) -> None:
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["image_size"] == [HEIGHT, WIDTH]
    data = json.loads((run / "data.json").read_text())
    assert (data["image_size"], data["crop"], data["validation"]["crop"]) == ([WIDTH, HEIGHT], "adm", "adm")
    log = (run / "log.txt").read_text()
    assert "data: 36 images, 8 x 12 (height x width), grey, 3 classes; held out: 12 images" in log
    assert "note: the images in" in log
    assert "were cropped by the rule adm when they were prepared" in log
    suggested = yaml.safe_load((run.parent / "suggested.yaml").read_text())["model"]
    assert suggested["image_size"] == [HEIGHT, WIDTH]
    assert HEIGHT % suggested["patch_size"] == WIDTH % suggested["patch_size"] == 0


def test_it_is_evaluated_and_reported(run: Path, evaluated: dict[str, object]) -> None:
    assert evaluated["reference"]["image_size"] == f"{HEIGHT},{WIDTH}"  # type: ignore[index]
    assert evaluated["reference"]["crop"].startswith("ADM's centre crop")  # type: ignore[index]
    with Image.open(run / "evals/images-000000000480/grid.png") as grid:
        cell = np.array(grid.size) / (2, 3)  # columns, rows
        assert cell[0] / cell[1] == pytest.approx((WIDTH + 3) / (HEIGHT + 2.7), abs=0.08)
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size > 10_000


def test_it_is_sampled_as_pictures_and_as_an_array(run: Path, tmp_path: Path) -> None:
    words = ["sample", str(run), "--num", "6", "--out"]
    assert main([*words, str(tmp_path / "s"), "--format", "npz"]) == 0
    with np.load(tmp_path / "s" / "samples.npz") as file:
        assert file["arr_0"].shape == (6, HEIGHT, WIDTH, 3)
    for path in (tmp_path / "s" / "images").iterdir():
        with Image.open(path) as picture:
            assert picture.size == (WIDTH, HEIGHT)


def test_its_images_go_to_likelihoods_and_to_latents_and_back(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluated: dict[str, object]
) -> None:
    held_out, folder = run.parent / "set/val", run.parent / "pictures"
    assert main(["likelihood", str(run), str(held_out), "--out", str(tmp_path / "l")]) == 0
    assert main(["likelihood", str(run), str(folder), "--num", "8", "--out", str(tmp_path / "f")]) == 0
    said = capsys.readouterr().out
    assert "bits per dimension over 12 images" in said
    assert "are not 8 x 12 (height x width) pixels: such images are cropped to their largest centred rectangle" in said
    assert main(["encode", str(run), str(held_out), "--out", str(tmp_path / "z")]) == 0
    assert main(["decode", str(run), str(tmp_path / "z"), "--out", str(tmp_path / "back")]) == 0
    assert "largest round-trip error" in capsys.readouterr().out
    with Image.open(next((tmp_path / "back" / "images").iterdir())) as picture:
        assert picture.size == (WIDTH, HEIGHT)


def test_it_is_used_from_python_and_from_files(run: Path, tmp_path: Path) -> None:
    flow = tarflow.load(run)
    assert flow.sample(2).shape == (2, 1, HEIGHT, WIDTH)
    (batch,) = evaluation_batches(DataSettings.of(run.parent / "set/val"), ImageShape((HEIGHT, WIDTH), 1, 3), 12)
    images = batch.images
    real, upside_down = (flow.bits_per_dim(some, batch.labels).mean() for some in (images, images.flip(2)))
    assert real < upside_down - 0.04, "rows are where they were in training"
    for name in ("w.safetensors", "w.pth"):
        assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / name)]) == 0
        assert tarflow.load(tmp_path / name).config.image_size == (HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=rf"the shape \[N, 1, {HEIGHT}, {WIDTH}\], not \[12, 1, {WIDTH}, {HEIGHT}\]"):
        flow.encode(images.transpose(2, 3))


def test_a_reference_and_a_score_take_its_size(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.evaluation.conftest import FakeFeatures

    for module in ("references.make", "worker.score_folder"):
        monkeypatch.setattr(f"tarflow.evaluation.{module}.Features", FakeFeatures)
    out, data = tmp_path / "reference.npz", str(run.parent / "set/train")
    assert main(["reference", data, "--size", f"{HEIGHT},{WIDTH}", "--channels", "1", "--out", str(out)]) == 0
    pictures_there = str(run.parent / "pictures")
    assert main(["score", pictures_there, "--reference", str(out), "--out", str(tmp_path / "s.json")]) == 0
    found = json.loads((tmp_path / "s.json").read_text())["images"]
    assert (found["image_size"], found["cropped_or_resized"]) == (f"{HEIGHT},{WIDTH}", 48)
    assert found["crop"].startswith("largest centred rectangle of the same shape")
    assert main(["score", pictures_there, "--reference", str(out), "--size", "8"]) == 2
    assert main(["reference", data, "--size", "8,0"]) == 2
