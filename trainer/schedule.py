"""The learning rate as a pure function of `images_seen`: there is no scheduler state to save or restore."""

import math

from tarflow.trainer.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, images_seen: int, warmup_images: int, max_images: int) -> float:
    """Learning rate of the step that ends at `images_seen`: linear warmup, then half a cosine to `final_lr`.

    Past `max_images` it stays at `final_lr`, where an unclamped cosine would rise again.
    """
    if images_seen < warmup_images:
        return optim.lr * images_seen / warmup_images
    span = max(max_images - warmup_images, 1)
    progress = min((images_seen - warmup_images) / span, 1.0)
    return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
