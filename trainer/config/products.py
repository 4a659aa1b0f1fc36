"""Bounds on products of settings: each may be within its own bounds, and together they ask for what no machine has."""

import json
import math
from collections.abc import Iterator
from typing import Any

from tarflow.image_size import sides

FARTHEST = 30  # standard deviations from the middle of a normal distribution; beyond, its probabilities underflow
_IMAGE = ("model.image_size",)  # counts for both of its sides

# Settings (of a list, all entries), the largest product, what it counts. A 0 (`all` or `none`) makes the product 0.
PRODUCTS: tuple[tuple[tuple[str, ...], int, str], ...] = (
    (("train.global_batch_size", *_IMAGE), 1 << 44, "pixels in a step"),
    (("data.prefetch_batches", "train.global_batch_size", *_IMAGE), 1 << 46, "prefetched pixels"),
    (("data.num_workers", "data.max_image_pixels"), 1 << 40, "pixels decoded at once"),
    (("parallel.dp_replicate", "parallel.dp_shard"), 1 << 20, "ranks"),
    (("sampling.batch_size", *_IMAGE), 1 << 38, "pixels sampled at once"),
    (("evaluation.num_samples", *_IMAGE), 1 << 50, "pixels of samples"),
    (("evaluation.likelihood_draws", "evaluation.validation_images"), 10**12, "likelihoods"),
    (("evaluation.final_num_samples", *_IMAGE), 1 << 50, "pixels of samples"),
    (("evaluation.final_likelihood_draws", "evaluation.final_validation_images"), 10**12, "likelihoods"),
    (("evaluation.neighbour_samples", "evaluation.neighbour_images"), 10**14, "pairs of images"),
    (("evaluation.neighbour_samples", *_IMAGE), 1 << 40, "pixels of samples held in memory"),
    (("evaluation.grid", *_IMAGE), 1 << 33, "pixels of a grid"),
)


def oversized(config: Any) -> Iterator[str]:
    """An error text for each product over its bound, with the settings, their values and the bound."""
    for keys, most, what in PRODUCTS:
        values = [_value(config, key) for key in keys]
        pixels = (sides(value) if (key,) == _IMAGE else value for key, value in zip(keys, values))
        product = math.prod(math.prod(value) if isinstance(value, tuple) else value for value in pixels)
        if product > most:
            factors = " x ".join(f"{key}={json.dumps(value)}" for key, value in zip(keys, values))
            yield f"{factors} makes {product:.2g} {what}, and {most:.2g} is the most: lower one of them"


def _value(config: Any, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name) or 0  # null: as another setting


def log_normal_problem(bounds: tuple[float, float], log_normal: tuple[float, float]) -> str | None:
    """Why no noise level of this distribution falls between `bounds`, or None: its probabilities underflow far outside."""
    mean, std = log_normal
    low, high = map(math.log, bounds)
    if max(low - mean, mean - high) <= FARTHEST * std:
        return None
    return (
        f"train.noise_range=[{bounds[0]:g}, {bounds[1]:g}] lies more than {FARTHEST} standard deviations from the middle of "
        f"train.noise_log_normal=[{mean:g}, {std:g}], exp({mean:g}) = {math.exp(mean):.3g}: no level of that distribution "
        "falls into it"
    )
