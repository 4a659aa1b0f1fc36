"""The configurations of the paper (arXiv 2412.06329, table 2 and appendix) and of its follow-up (2604.20041), one line each.

A name is dataset and image size, then patch-channels-blocks-layers: `imagenet64-2-768-8-8`; or `iterative`, whose model is
told the noise level and has its depth in the block that is sampled first.
"""

from tarflow.models.config import TarFlowConfig
from tarflow.models.errors import ModelError

#                            image patch channels blocks layers classes
_TABLE: dict[str, tuple[int, int, int, int, int | tuple[int, ...], int]] = {
    "imagenet64-2-768-8-8":      (64,  2,   768,    8,     8,    1000),
    "imagenet64-2-768-8-8-uncond": (64, 2,  768,    8,     8,       0),
    "imagenet64-4-1024-8-8":     (64,  4,  1024,    8,     8,    1000),
    "imagenet128-4-1024-8-8":    (128, 4,  1024,    8,     8,    1000),
    "imagenet256-8-1280-8-8":    (256, 8,  1280,    8,     8,    1000),
    "afhq256-8-768-8-8":         (256, 8,   768,    8,     8,       3),
    "imagenet64-iterative":      (64,  2,  1280,    4, (4, 4, 4, 24), 1000),
    "imagenet128-iterative":     (128, 4,  1600,    4, (4, 4, 4, 24), 1000),
    "imagenet256-iterative":     (256, 8,  2176,    4, (4, 4, 4, 24), 1000),
}  # fmt: skip


def preset(name: str) -> TarFlowConfig:
    """The configuration of this name. Raises ModelError with the known names for an unknown one."""
    if name not in _TABLE:
        raise ModelError(f"unknown preset {name!r}; known: {', '.join(_TABLE)}")
    size, patch, channels, blocks, layers, classes = _TABLE[name]
    return TarFlowConfig(
        image_size=size, patch_size=patch, channels=channels, num_blocks=blocks, layers_per_block=layers,
        num_classes=classes, noise_conditioning=name.endswith("-iterative"),
    )  # fmt: skip


def preset_names() -> list[str]:
    """All names, in the order of the table."""
    return list(_TABLE)
