"""`data.transform`: what a user's function makes of a training image, with random numbers keyed by epoch and image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline import keyed
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.custom.code import Function, Named, find_function
from tarflow.data_pipeline.loading.custom.pixels import to_pixels


class Transform:
    """Calls `function(image, rng)`: image uint8 [H, W, C] as decoded, C = 1 or 3; what it returns may have another size.

    `rng` is a `numpy.random.Generator` (Philox) whose key is made of (seed, epoch, image): the same for any number of ranks and
    workers, and after any resume. Raises DataError where the function cannot be found.
    """

    def __init__(self, named: Named, seed: int, max_pixels: int) -> None:
        self.function: Function = find_function("data.transform", named)
        self.seed, self.max_pixels = seed, max_pixels

    def __call__(self, image: NDArray[np.uint8], epoch: int, sample: int) -> NDArray[np.uint8]:
        """uint8 [H, W, C] -> uint8 [H', W', C]. Raises BadSampleError, naming the function and the image's number."""
        with self.function.blamed(f"image {sample}, epoch {epoch}"):
            made = self.function.call(image, rng(self.seed, epoch, sample))
            return to_pixels(made, image.shape[2], self.max_pixels)

    def check(self, image: NDArray[np.uint8], sample: int) -> None:
        """Raise DataError unless the same key gives the same image twice."""
        first, second = (self(image.copy(), 0, sample) for _ in range(2))
        if first.shape != second.shape or not np.array_equal(first, second):
            raise DataError(
                f"{self.function}: image {sample} comes out differently when it is transformed again with the same random "
                "numbers, so no run could be resumed exactly: draw from the generator that the function is given, not from "
                "random, numpy.random or torch"
            )


def rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random numbers of one image in one epoch."""
    words = [keyed.key(seed, f"transform/{half}", epoch, sample) for half in "ab"]
    return np.random.Generator(np.random.Philox(key=np.array(words, dtype=np.uint64)))
