"""A batch, as the loader and the evaluation deliver it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass
class Batch:
    """The share (b samples) of one rank in a global batch.

    `images`: uint8 [b, C, H, W], laid out channels last in memory (a permuted view: use reshape, not view).
    `labels`: int64 [b], -1 = no label. `ids`: int64 [b], index of each sample in the data set, after replacement of
    bad samples. `slots`: int64 [b], index of each sample in the global batch (keys noise and label drop).
    `images_seen`: images seen before this batch, by all ranks together.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    slots: torch.Tensor
    images_seen: int

    @classmethod
    def of(
        cls,
        images: torch.Tensor,
        labels: NDArray[np.int64],
        ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        images_seen: int,
    ) -> Batch:
        """From images as decoded, uint8 [b, H, W, C]."""
        return cls(
            images=images.permute(0, 3, 1, 2),
            labels=torch.from_numpy(labels),
            ids=torch.from_numpy(ids),
            slots=torch.from_numpy(np.array(slots, dtype=np.int64)),
            images_seen=images_seen,
        )
