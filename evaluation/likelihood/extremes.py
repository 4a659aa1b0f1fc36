"""The most and the least likely images met so far, with their pixels."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow.evaluation.likelihood.per_image import ImageLikelihoods


class Extremes:
    """At most `most` images from each end. Ties go to the lower number, so that chunks may come in any order."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: dict[tuple[float, int], NDArray[np.uint8]] = {}  # (bits per dimension, number) -> its pixels

    def add(self, found: ImageLikelihoods, pixels: NDArray[np.uint8]) -> None:
        """Images uint8 [n, C, H, W] in the order of `found`; those without a finite likelihood are skipped."""
        for bits, number, image in zip(found.mean.tolist(), found.ids.tolist(), pixels):
            if np.isfinite(bits):
                self._kept[bits, number] = image
        order = sorted(self._kept)
        kept = {*order[: self.most], *order[max(len(order) - self.most, 0) :]}
        self._kept = {key: image for key, image in self._kept.items() if key in kept}

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Their numbers, by likelihood."""
        return np.array([number for _, number in sorted(self._kept)], dtype=np.int64)

    def stacked(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """[n, *shape], in the order of `numbers`."""
        images = [self._kept[key] for key in sorted(self._kept)]
        return np.stack(images) if images else np.zeros((0, *shape), dtype=np.uint8)

    @property
    def pictures(self) -> dict[int, Tensor]:
        """Number -> uint8 [C, H, W]."""
        return {number: torch.from_numpy(image) for (_, number), image in self._kept.items()}
