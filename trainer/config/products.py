"""Products of settings, each of which is within its bounds: together they may ask for what no machine has."""

import math
from collections.abc import Iterator
from typing import Any

_IMAGE = ("model.image_size", "model.image_size")

# Settings (of a list, each entry), the largest product, what it is. A 0, which stands for `all` or `none`, asks for nothing.
PRODUCTS: tuple[tuple[tuple[str, ...], int, str], ...] = (
    (("train.global_batch_size", *_IMAGE), 1 << 44, "pixels in a step"),
    (("data.prefetch_batches", "train.global_batch_size", *_IMAGE), 1 << 46, "pixels that wait ready"),
    (("data.num_workers", "data.max_image_pixels"), 1 << 40, "pixels that are decoded at once"),
    (("parallel.dp_replicate", "parallel.dp_shard"), 1 << 20, "ranks"),
    (("sampling.batch_size", *_IMAGE), 1 << 38, "pixels that are drawn at once"),
    (("evaluation.num_samples", *_IMAGE), 1 << 50, "pixels of samples"),
    (("evaluation.likelihood_draws", "evaluation.validation_images"), 10**12, "likelihoods"),
    (("evaluation.neighbour_samples", "evaluation.neighbour_images"), 10**14, "pairs of images"),
    (("evaluation.neighbour_samples", *_IMAGE), 1 << 40, "pixels of samples that memory holds"),
    (("evaluation.grid", *_IMAGE), 1 << 33, "pixels of a grid"),
)


def oversized(config: Any) -> Iterator[str]:
    """What is wrong with each product that is over its bound: the settings, their values, the bound."""
    for keys, most, what in PRODUCTS:
        values = [_value(config, key) for key in keys]
        product = math.prod(math.prod(value) if isinstance(value, tuple) else value for value in values)
        if product > most:
            factors = " x ".join(f"{key}={value}" for key, value in zip(keys, values))
            yield f"{factors} makes {product:.2g} {what}, and {most:.2g} is the most: lower one of them"


def _value(config: Any, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
