"""Inception score of class probabilities (Salimans et al., arXiv 1606.03498): exp of the mean of KL(p(y|x) || p(y))."""

import numpy as np
import torch
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError

SPLITS = 10


class InceptionScore:
    """Sums over `total` samples in `splits` runs of neighbouring samples, streamed: memory holds a row per split.

    Neighbouring, not every tenth: labels come in turn, so every tenth sample of ten classes has the same label.
    """

    def __init__(self, classes: int, total: int, splits: int = SPLITS) -> None:
        if total < 1:
            raise EvaluationError("an Inception score needs at least one sample")
        self.total, self.splits = total, min(splits, total)
        self._count = torch.zeros(self.splits, dtype=torch.float64)
        self._sums = torch.zeros(self.splits, classes, dtype=torch.float64)
        self._negative_entropy = torch.zeros(self.splits, dtype=torch.float64)

    def add(self, positions: Tensor, probabilities: Tensor) -> None:
        """Take in samples at `positions` int64 [n] in 0..total-1, with `probabilities` [n, classes] that sum to 1."""
        p = probabilities.double().cpu()
        if not torch.isfinite(p).all() or (p < 0).any() or ((p.sum(dim=1) - 1).abs() > 1e-3).any():
            raise EvaluationError("class probabilities must be finite, not negative and sum to 1")
        split = positions.cpu() * self.splits // self.total
        self._count.index_add_(0, split, torch.ones(len(p), dtype=torch.float64))
        self._sums.index_add_(0, split, p)
        self._negative_entropy.index_add_(0, split, torch.special.xlogy(p, p).sum(dim=1))

    def merge(self, other: "InceptionScore") -> None:
        """Take in the sums of other samples of the same whole."""
        if (self.total, self._sums.shape) != (other.total, other._sums.shape):
            raise EvaluationError("Inception scores of different wholes cannot be merged")
        self._count += other._count
        self._sums += other._sums
        self._negative_entropy += other._negative_entropy

    def result(self) -> tuple[float, float]:
        """(mean over the splits, standard deviation between them), as published scores are given."""
        there = self._count > 0
        if not there.any():
            raise EvaluationError("an Inception score needs at least one sample")
        count, mean = self._count[there], self._sums[there] / self._count[there].unsqueeze(1)
        divergence = self._negative_entropy[there] / count - torch.special.xlogy(mean, mean).sum(dim=1)
        scores = divergence.exp().numpy()
        return float(np.mean(scores)), float(np.std(scores))
