"""The learning rate as a pure function of `images_seen` (contract 1): nothing to save, nothing to restart (case T08)."""

import math

from tarflow.trainer.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, images_seen: int, warmup_images: int, max_images: int) -> float:
    """Rate of the step that brings the count to `images_seen`: linear over the warm-up, then half a cosine to final_lr.

    Progress is clamped: past `max_images` the rate stays at final_lr instead of rising again.
    """
    if images_seen < warmup_images:
        return optim.lr * images_seen / warmup_images
    span = max(max_images - warmup_images, 1)
    progress = min((images_seen - warmup_images) / span, 1.0)
    return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
