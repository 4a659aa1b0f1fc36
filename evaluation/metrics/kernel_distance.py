"""Kernel distance between two clouds of features, the KID (Binkowski et al., arXiv 1801.01401).

The unbiased estimate of the squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, over all pairs of images:
subsets would only add noise. The kernel matrices are summed tile by tile and never held in memory.

The standard error is a jackknife's: both sides are split into disjoint blocks, and the estimate is repeated without each of
them (the usual recipe draws overlapping subsets, whose spread is not a standard error). Unlike a Frechet distance the
estimate does not grow with fewer images, and it may be negative for equal clouds.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError

BLOCK = 1000  # images of a side in a block
MIN_BLOCKS = 10  # with fewer images the blocks are smaller instead
TILE = 2000  # rows of a tile of a kernel matrix
ALL_PAIRS = "all pairs"  # marks this estimate in results; those of version 0.1 hold means over the blocks


@dataclass(frozen=True)
class KernelResult:
    """The estimate over all pairs, and its standard error from `blocks` (None with a single one)."""

    distance: float
    stderr: float | None
    blocks: int


def kernel_distance(first: Tensor, second: Tensor, block: int = BLOCK, seed: int = 0) -> KernelResult:
    """Features [n, d] and [m, d] -> KID. Memory beyond the features: one tile of a kernel matrix, float64.

    The rows are shuffled into blocks by `seed`, since data sets are often sorted. Raises EvaluationError below two
    images on a side.
    """
    fewer = min(len(first), len(second))
    if first.shape[1] != second.shape[1]:
        raise EvaluationError(f"cannot compare {first.shape[1]} features with {second.shape[1]}: use one network")
    if fewer < 2:
        raise EvaluationError(
            f"a kernel distance needs at least 2 images on each side, got {len(first)}, {len(second)}"
        )
    blocks = max(fewer // block, min(MIN_BLOCKS, fewer // 2))
    ours, theirs = _split(first, blocks, seed), _split(second, blocks, seed + 1)
    sums = _Sums(
        np.array([len(rows) for rows in ours]),
        np.array([len(rows) for rows in theirs]),
        _block_sums(ours, ours),
        _block_sums(theirs, theirs),
        _block_sums(ours, theirs),
    )
    # Leave out one block of one side at a time.
    whole = np.ones(blocks)
    if blocks == 1:
        return KernelResult(sums.estimate(whole, whole), None, blocks)
    without = 1 - np.eye(blocks)
    spread = sum(
        np.var([sums.estimate(*kept) for kept in side]) * (blocks - 1)
        for side in ([(rows, whole) for rows in without], [(whole, rows) for rows in without])
    )
    return KernelResult(sums.estimate(whole, whole), float(spread**0.5), blocks)


@dataclass(frozen=True)
class _Sums:
    """Sums of the kernel between blocks, over pairs of different rows: within each side, and across."""

    ours: NDArray[np.float64]  # [g] rows in the blocks of the first side
    theirs: NDArray[np.float64]  # [g] of the second
    within_ours: NDArray[np.float64]  # [g, g]
    within_theirs: NDArray[np.float64]
    across: NDArray[np.float64]

    def estimate(self, first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
        """Equation 4 with the blocks that have a 1 in `first` [g] and `second` [g]."""
        n, m = first @ self.ours, second @ self.theirs
        own = first @ self.within_ours @ first / (n * (n - 1)) + second @ self.within_theirs @ second / (m * (m - 1))
        return float(own - 2 * (first @ self.across @ second) / (n * m))


def _split(rows: Tensor, blocks: int, seed: int) -> list[Tensor]:
    """All rows in `blocks` disjoint blocks of nearly equal size."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[torch.from_numpy(part)] for part in np.array_split(order, blocks)]


def _block_sums(first: list[Tensor], second: list[Tensor]) -> NDArray[np.float64]:
    """float64 [g, g]: the kernel summed over the pairs of two blocks; of one side with itself, over different rows."""
    same = first is second
    sums = np.zeros((len(first), len(second)))
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            if same and j < i:
                sums[i, j] = sums[j, i]  # the matrix is symmetric
                continue
            sums[i, j] = sum(float(_kernel(p, q).sum()) for p in a.split(TILE) for q in b.split(TILE))
            if same and i == j:
                sums[i, j] -= float((a.double().square().sum(1) / a.shape[1] + 1).pow(3).sum())
    return sums


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3
