"""A tiny labelled data set in indexed shards, and a configuration that trains on it in seconds."""

from pathlib import Path

import numpy as np
import pytest
import yaml


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 grey 8 px images in 3 classes: bright spots whose place is the class, with some noise."""
    from data_pipeline.prepare import Options, prepare
    from data_pipeline.sources import open_source

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
