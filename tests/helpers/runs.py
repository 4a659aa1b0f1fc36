"""Configurations that train within seconds on the sets of `tests.helpers.data`."""

from pathlib import Path
from typing import Any

import yaml

MODEL: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "in_channels": 1, "channels": 64, "num_blocks": 2, "layers_per_block": 1,
    "num_classes": 3,
}  # fmt: skip


def write_config(path: Path, data: Path, /, **sections: dict[str, Any]) -> Path:
    """Write a configuration for a set of grey 8 px images: `sections` beside the model, which `model` changes."""
    tree = {"data": {"train": str(data)}, "model": MODEL, "log": {"every_steps": 1, "tensorboard": False}}
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    path.write_text(yaml.safe_dump(tree))
    return path
