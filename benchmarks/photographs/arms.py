"""What is compared, and at which sizes: an arm is a name and the settings that it changes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Arm:
    """A recipe: its name, and the settings that it adds to BASE at a size in pixels."""

    name: str
    settings: Callable[[int], dict[str, Any]]


# Sizes have the same number of tokens (256) and differ in what a token holds, so that an image costs about as much.
PATCH = {64: 4, 128: 8, 256: 16, 512: 32}
# Share of --minutes that each size gets; 512 px is a smoke test of a few steps.
SHARE = {64: 1.0, 128: 0.25, 256: 0.25, 512: 0.0}
# Noise of plain TarFlow, as in the paper for these sizes; held-out bits of every arm are those of images with this noise.
NOISE = {64: 0.05, 128: 0.15, 256: 0.15, 512: 0.15}
SMOKE_STEPS = 4
BATCH = 32

BASE: dict[str, Any] = {
    "data.num_workers": 0,  # all CPU time is the run's own
    "data.flip": True,
    "model.in_channels": 3,
    "model.channels": 128,
    "model.num_blocks": 4,
    "model.layers_per_block": 4,
    "train.global_batch_size": BATCH,
    "train.label_dropout": 0.1,
    "train.grad_clip": 1.0,
    "optim.lr": 1e-3,
    "optim.final_lr": 1e-5,
    "log.every_steps": 25,
    "sampling.guidance": 1.0,
    "sampling.annealed": False,
    "sampling.batch_size": 50,
}

LEVELS = {64: (0.01, 0.3), 128: (0.01, 0.5), 256: (0.01, 0.7), 512: (0.01, 0.7)}  # t0 and t1 of the follow-up recipe


def plain(size: int) -> dict[str, Any]:
    """TarFlow as first published: one noise level, blocks of one depth, one denoising step."""
    return {"train.noise_std": NOISE[size]}


def iterative(size: int) -> dict[str, Any]:
    """The follow-up recipe (arXiv 2604.20041): many noise levels, as many layers deep-shallow, ten denoising steps."""
    return {
        "model.layers_per_block": [2, 2, 2, 10],
        "model.noise_conditioning": True,
        "train.noise_range": list(LEVELS[size]),
        "sampling.guidance_form": "sigma",
        "sampling.guide_blocks": [-1],
        "sampling.denoise_steps": 10,
        "evaluation.likelihood_noise": NOISE[size],
    }


ARMS = (Arm("plain", plain), Arm("iterative", iterative))


def reference_images(size: int, quick: bool) -> int:
    """Training images behind the reference statistics; the feature network takes some 35 of them a second."""
    return 200 if quick or not SHARE[size] else 2000


def settings_of(arm: Arm, size: int, data: str, classes: int, max_images: int, quick: bool) -> dict[str, Any]:
    """All settings of one run, by name."""
    saves = 1 if quick or not SHARE[size] else 6
    samples = 32 if quick or not SHARE[size] else 320 if size == 64 else 160
    every = -(-max_images // saves)
    return BASE | {
        "data.train": f"{data}/train",
        "data.validation": f"{data}/val",
        "model.image_size": size,
        "model.patch_size": PATCH[size],
        "model.num_classes": classes,
        "train.max_images": max_images,
        "optim.warmup_images": min(3200, max_images // 10),
        "checkpoint.every_images": every,
        "checkpoint.keep_every_images": every,  # those at the end of a slice are not evaluated
        "evaluation.num_samples": max(32, samples // 4),
        "evaluation.final_num_samples": samples,
        "evaluation.reference_images": reference_images(size, quick),
        "evaluation.validation_images": 2 * max(32, samples // 4),
        "evaluation.neighbour_samples": min(samples, 100),
        "evaluation.neighbour_images": 0,
        "evaluation.grid": [3, 8],
    } | arm.settings(size)  # fmt: skip
