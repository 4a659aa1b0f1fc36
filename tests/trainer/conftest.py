"""A tiny labelled data set in indexed shards, a configuration that trains on it in seconds, and cheap real ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 grey 8 px images in 3 classes: bright spots whose place is the class, with some noise."""
    from tarflow.data_pipeline.prepare.sources import open_source
    from tarflow.data_pipeline.prepare.write import Options, prepare

    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 3
    images = rng.integers(0, 60, (96, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[2:6, 2 * label : 2 * label + 3] += 150
    np.savez(folder / "images.npz", images=images, labels=labels)
    prepare(open_source(folder / "images.npz"), folder / "set", Options(size=8, shard_size=40))
    return folder / "set"


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> Path:
    """A configuration file for the tiny set: 30 steps of 16 images."""
    tree = {
        "data": {"train": str(tiny_data)},
        "model": {
            "image_size": 8, "patch_size": 2, "in_channels": 1, "channels": 64, "num_blocks": 2, "layers_per_block": 1,
            "num_classes": 3,
        },
        "train": {"global_batch_size": 16, "max_images": 480, "noise_std": 0.1, "param_dtype": "bfloat16"},
        "optim": {"lr": 1e-3, "warmup_images": 32},
        "checkpoint": {"every_images": 80},
        "log": {"every_steps": 5, "tensorboard": False},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


Start = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    """Start real ranks and wait for their end: see `benchmarks.fault_ranks.serve`. They print into RUN-output.txt."""
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fault_ranks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    sent, heard = server.stdin, server.stdout

    def ask(config: Path, run: Path, *overrides: str, **order: Any) -> dict[str, Any]:
        whole = order | {"config": str(config), "run": str(run), "overrides": overrides}
        sent.write(json.dumps(whole) + "\n")
        sent.flush()
        answer = heard.readline()
        assert answer, "the server of ranks is gone"
        return dict(json.loads(answer))

    yield ask
    sent.close()
    server.wait(10)
