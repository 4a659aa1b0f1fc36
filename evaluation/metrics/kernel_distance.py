"""Kernel distance between two clouds of features, the KID (Binkowski et al., arXiv 1801.01401).

The unbiased estimate of the squared maximum mean discrepancy under the kernel (x.y / d + 1)^3. Both sides are cut into
as many disjoint blocks; the blocks' estimates are independent, so their spread gives a true standard error (the usual
recipe draws overlapping subsets, whose spread is no standard error). Unlike a Frechet distance it does not grow with
fewer images, and it may come out below zero for equal clouds.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError

BLOCK = 1000  # images of a side in a block
LEAST_BLOCKS = 10  # with fewer images the blocks are smaller instead


@dataclass(frozen=True)
class KernelResult:
    """The mean over blocks and its standard error (None with a single block)."""

    distance: float
    stderr: float | None
    blocks: int


def kernel_distance(first: Tensor, second: Tensor, block: int = BLOCK, seed: int = 0) -> KernelResult:
    """Features [n, d] and [m, d] -> KID. Memory beyond the features: three matrices of block x block in float64.

    The rows are dealt to blocks in an order keyed by `seed`: data sets are often sorted. Raises EvaluationError under
    two images on a side.
    """
    fewer = min(len(first), len(second))
    if first.shape[1] != second.shape[1]:
        raise EvaluationError(f"cannot compare {first.shape[1]} features with {second.shape[1]}: use one network")
    if fewer < 2:
        raise EvaluationError(
            f"a kernel distance needs at least 2 images on each side, got {len(first)}, {len(second)}"
        )
    blocks = max(fewer // block, min(LEAST_BLOCKS, fewer // 2))
    values = [
        _squared_discrepancy(first[ours].double(), second[theirs].double())
        for ours, theirs in zip(_deal(len(first), blocks, block, seed), _deal(len(second), blocks, block, seed + 1))
    ]
    stderr = float(np.std(values, ddof=1)) / blocks**0.5 if blocks > 1 else None
    return KernelResult(float(np.mean(values)), stderr, blocks)


def _deal(count: int, blocks: int, most: int, seed: int) -> list[Tensor]:
    """Indices of `blocks` disjoint blocks of equal size, at most `most`."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    size = min(count // blocks, most)
    return list(order[: size * blocks].view(blocks, size))


def _squared_discrepancy(x: Tensor, y: Tensor) -> float:
    """Equation 4: means over pairs of different rows within each side, over all pairs across."""
    n, m = len(x), len(y)
    within_x, within_y = _kernel(x, x), _kernel(y, y)
    first = (within_x.sum() - within_x.trace()) / (n * (n - 1))
    second = (within_y.sum() - within_y.trace()) / (m * (m - 1))
    return float(first + second - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
