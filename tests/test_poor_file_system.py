"""Real commands on a file system without locks, links, fsync, times or modes: they do their work, and say what is lacking."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.helpers.warm import warm

CONFIG = {
    "data": {"train": "set/train", "validation": "set/val"},
    "model": {"image_size": 8, "patch_size": 4, "in_channels": 1, "channels": 16, "num_blocks": 2, "layers_per_block": 1,
              "head_channels": 8, "num_classes": 3},
    "train": {"global_batch_size": 16, "max_images": 64, "noise_std": 0.1},
    "optim": {"lr": 1e-3, "warmup_images": 32},
    "checkpoint": {"every_images": 16, "keep_latest": 2},
    "ema": {"relative_stds": [0.1], "snapshot_every_images": 32},
    "log": {"every_steps": 1, "tensorboard": False},
    "evaluation": {"num_samples": 8, "grid": [2, 2], "validation_images": 4, "neighbour_images": 8},
}  # fmt: skip
COMMANDS = """
data prepare images.npz set --size 8 --val-fraction 0.2
data index set/train
train tiny.yaml --run-dir run
train tiny.yaml --run-dir run train.max_images=96
checkpoint verify run
checkpoint export run --out w.safetensors
ema run --relative-std 0.11 --out ema.safetensors
evaluate run --newest --save shards
sample run --out samples --num 3
report run
checkpoint prune run
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder, what the commands printed, their errors."""
    folder = tmp_path_factory.mktemp("poor")
    labels = np.arange(60) % 3
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=labels)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    commands = [line.split() for line in COMMANDS.strip().splitlines()]
    line = warm("tests.helpers.programs.poor_commands", json.dumps(commands))
    ran = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)
    return folder, ran.stdout, ran.stderr


@pytest.mark.case("F01", "F02")
def test_every_command_does_its_work(done: tuple[Path, str, str]) -> None:
    _, out, err = done
    assert [line for line in out.splitlines() if line.startswith("= ")] == ["= 0"] * len(
        COMMANDS.strip().splitlines()
    ), err
    assert "Traceback" not in err
    assert "WARNING" not in out
    assert "finished: 64 images" in out
    assert "resuming at 64 images" in out
    assert "finished: 96 images" in out


@pytest.mark.case("F01", "F02")
def test_what_is_lacking_is_said_once(done: tuple[Path, str, str]) -> None:
    _, _, err = done
    lacks = [line.partition(") has no ")[2] for line in err.splitlines() if line.startswith("note: the file system ")]
    notes = [lack.partition(" (")[0] for lack in lacks]
    assert sorted(notes) == ["fsync of directories", "fsync of files", "locks"]


@pytest.mark.case("F01", "F02")
def test_nothing_is_left_behind(done: tuple[Path, str, str]) -> None:
    folder, _, _ = done
    left = [
        p for p in folder.rglob("*") if p.suffix in (".tmp", ".partial", ".gone", ".old") or p.name.startswith(".lock.")
    ]
    assert left == []
