"""Small data sets of every kind, and a configuration that fits one of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.trainer.config.files import parse_config
from tarflow.trainer.config.schema import Config

Make = Callable[..., Path]


@pytest.fixture
def make_set(tmp_path: Path) -> Make:
    """`make_set(name, labels=[...] | None, size=8, channels=3, classes=[...] | None, val=0.0)`: prepared random images."""
    from tarflow.data_pipeline.prepare.sources import open_source
    from tarflow.data_pipeline.prepare.write import Options, prepare

    def make(
        name: str, labels: Any = (0, 1, 2, 3) * 3, size: int = 8, channels: int = 3,
        classes: list[str] | None = None, val: float = 0.0, number: int = 12,
    ) -> Path:  # fmt: skip
        arrays: dict[str, Any] = {} if labels is None else {"labels": np.array(labels)}
        number = number if labels is None else len(labels)
        pixels = np.random.default_rng(len(name)).integers(0, 256, (number, size, size, channels), dtype=np.uint8)
        file = tmp_path / f"{name.replace('/', '-')}.npz"
        np.savez(file, images=pixels, **arrays)
        source = open_source(file)
        source.classes = classes
        prepare(source, tmp_path / name, Options(size=size, val_fraction=val))
        return tmp_path / name

    return make


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """`make_config(train, section={...})`: 8 px, colour, 4 classes unless said otherwise."""

    def make(train: Path | str, /, **sections: dict[str, Any]) -> Config:
        tree: dict[str, Any] = {
            "data": {"train": str(train)},
            "model": {"image_size": 8, "patch_size": 2, "channels": 64, "num_blocks": 2, "layers_per_block": 1, "num_classes": 4},
            "train": {"global_batch_size": 4, "max_images": 40},
        }  # fmt: skip
        for section, values in sections.items():
            tree[section] = {k: v for k, v in (tree.get(section, {}) | values).items() if v is not ...}
        return parse_config(tree, "test")

    return make
