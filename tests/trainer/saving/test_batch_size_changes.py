"""A run goes on with another batch size: checkpoints are ordered, named and kept by images, steps never go back. Real ranks."""

import json
from pathlib import Path

import pytest

import tarflow.cli
from tarflow.models.weights import load_weights_file
from tarflow.trainer.checkpoint.find import committed, find
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.resilience.exit_codes import FINISHED

SETTINGS = ("checkpoint.every_images=48", "log.every_steps=1", "optim.warmup_images=16")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run"


def until(images: int, batch: int, *more: str) -> tuple[str, ...]:
    return (*SETTINGS, f"train.max_images={images}", f"train.global_batch_size={batch}", *more)


def moments(run: Path) -> list[tuple[str, int]]:
    return [(c.name, c.step) for c in committed(run)]


def latest(run: Path) -> str:
    return (run / "checkpoints" / "latest").read_text().strip()


@pytest.mark.case("V01")
def test_a_larger_batch_removes_nothing_that_was_just_saved_and_steps_go_on(start, tiny_config, run) -> None:
    assert start(tiny_config, run, *until(96, 4), ranks=1)["codes"] == [FINISHED]
    assert moments(run) == [("images-000000000048", 12), ("images-000000000096", 24)]
    assert start(tiny_config, run, *until(192, 16), ranks=1)["codes"] == [FINISHED]
    assert moments(run) == [("images-000000000144", 27), ("images-000000000192", 30)]
    assert start(tiny_config, run, *until(240, 8, "checkpoint.keep_latest=-1"), ranks=1)["codes"] == [FINISHED]
    assert moments(run)[1:] == [("images-000000000192", 30), ("images-000000000240", 36)]
    assert latest(run) == "images-000000000240"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == list(range(1, 37))  # a curve over steps never runs back, nor does one over images
    seen = [row["images_seen"] for row in rows if "train/loss" in row]
    assert seen == [*range(4, 97, 4), *range(112, 193, 16), *range(200, 241, 8)]


@pytest.mark.case("V01")
def test_two_ranks_with_a_larger_batch_are_killed_and_go_on_from_their_own_save(start, tiny_config, run) -> None:
    assert start(tiny_config, run, *until(96, 4), ranks=1)["codes"] == [FINISHED]
    two = until(288, 16, "parallel.backend=ddp")
    end = start(tiny_config, run, *two, ranks=2, fault="save.begin@3=kill")
    assert -9 in end["codes"]
    assert moments(run) == [("images-000000000144", 27), ("images-000000000192", 30)]
    assert start(tiny_config, run, *two, ranks=2)["codes"] == [FINISHED] * 2
    assert "resuming at 192 images (checkpoint images-000000000192)" in (run / "log.txt").read_text()
    assert moments(run)[-1] == (latest(run), 36)
    assert find(run).images_seen == 288


@pytest.mark.case("V01")
def test_export_takes_the_checkpoint_of_most_images_and_a_choice_by_images(start, tiny_config, run, tmp_path) -> None:
    keep_all = "checkpoint.keep_latest=-1"
    assert start(tiny_config, run, *until(96, 4, keep_all), ranks=1)["codes"] == [FINISHED]
    assert start(tiny_config, run, *until(144, 16, keep_all), ranks=1)["codes"] == [FINISHED]
    for name, choice, images in (("most", (), 144), ("some", ("--images", "96"), 96), ("step", ("--step", "12"), 48)):
        out = tmp_path / f"{name}.safetensors"
        assert tarflow.cli.main(["checkpoint", "export", str(run), "--out", str(out), "--weights", "raw", *choice]) == 0
        stored = load_weights(find(run, images=images), "raw")
        assert all((value == stored[key]).all() for key, value in load_weights_file(out)[1].items())


@pytest.mark.case("V01")
def test_what_crosses_a_multiple_is_kept_for_good_though_no_batch_size_divides_it(start, tiny_config, run) -> None:
    settings = ("checkpoint.every_images=1", "checkpoint.keep_every_images=50")
    assert start(tiny_config, run, *until(120, 12, *settings), ranks=1)["codes"] == [FINISHED]
    assert [c.images_seen for c in committed(run)] == [60, 108, 120]
    assert start(tiny_config, run, *until(200, 20, *settings), ranks=1)["codes"] == [FINISHED]
    assert [c.images_seen for c in committed(run)] == [60, 108, 160, 180, 200]
