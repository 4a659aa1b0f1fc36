"""Inception score of class probabilities (Salimans et al., arXiv 1606.03498): exp of the mean of KL(p(y|x) || p(y))."""

import numpy as np
import torch
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError

SPLITS = 10


class InceptionScore:
    """Sums over `total` samples in `splits` contiguous splits, streamed: memory holds a row per split.

    Contiguous, not every tenth sample: labels alternate, so every tenth sample of ten classes has the same label.
    """

    def __init__(self, classes: int, total: int, splits: int = SPLITS) -> None:
        if total < 1:
            raise EvaluationError("an Inception score needs at least one sample")
        self.total, self.splits = total, min(splits, total)
        self._count = torch.zeros(self.splits, dtype=torch.float64)
        self._sums = torch.zeros(self.splits, classes, dtype=torch.float64)
        self._negative_entropy = torch.zeros(self.splits, dtype=torch.float64)

    def add(self, positions: Tensor, probabilities: Tensor) -> None:
        """Add samples at `positions` int64 [n] in 0..total-1, with `probabilities` [n, classes] that sum to 1."""
        p = probabilities.double().cpu()
        if not torch.isfinite(p).all() or (p < 0).any() or ((p.sum(dim=1) - 1).abs() > 1e-3).any():
            raise EvaluationError("class probabilities must be finite, not negative and sum to 1")
        split = positions.cpu() * self.splits // self.total
        self._count.index_add_(0, split, torch.ones(len(p), dtype=torch.float64))
        self._sums.index_add_(0, split, p)
        self._negative_entropy.index_add_(0, split, torch.special.xlogy(p, p).sum(dim=1))

    def merge(self, other: "InceptionScore") -> None:
        """Add the sums of other samples of the same total."""
        if (self.total, self._sums.shape) != (other.total, other._sums.shape):
            raise EvaluationError("Inception scores of different totals cannot be merged")
        self._count += other._count
        self._sums += other._sums
        self._negative_entropy += other._negative_entropy

    def result(self) -> tuple[float, float]:
        """(mean over the splits, standard deviation between them), as scores are published."""
        filled = self._count > 0
        if not filled.any():
            raise EvaluationError("an Inception score needs at least one sample")
        count, mean = self._count[filled], self._sums[filled] / self._count[filled].unsqueeze(1)
        # KL(p(y|x) || p(y)), averaged over x, is the entropy of the mean minus the mean entropy.
        divergence = self._negative_entropy[filled] / count - torch.special.xlogy(mean, mean).sum(dim=1)
        scores = divergence.exp().numpy()
        return float(np.mean(scores)), float(np.std(scores))
