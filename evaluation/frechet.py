"""Frechet distance between two clouds of features (Heusel et al., arXiv 1706.08500, equation 6).

Everything is float64. Statistics are streamed in blocks of fixed size, so feeding 1, 7 or 1000 rows at a time gives
the same bits, and they are centred as they go, so a mean of 1e4 costs no digits (case S06). Two streams can be merged.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from evaluation.errors import EvaluationError

BLOCK = 256  # rows folded in at once: fixed, so that sums do not depend on how the rows came


class FeatureStatistics:
    """Count, mean [d] and scatter matrix [d, d] (sum of outer products about the mean) of rows of features."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        zero = torch.zeros(dim, dtype=torch.float64)
        self._parts: Parts = (0, zero, torch.outer(zero, zero))
        self._waiting: list[Tensor] = []

    def add(self, features: Tensor | np.ndarray) -> None:
        """Take in rows [n, d] of any float dtype. A row that is not finite is an error: it would spoil everything."""
        rows = torch.as_tensor(features).detach().to("cpu", torch.float64)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise EvaluationError(f"features must have shape [n, {self.dim}], got {list(rows.shape)}")
        if not torch.isfinite(rows).all():
            bad = int((~torch.isfinite(rows).all(dim=1)).sum())
            raise EvaluationError(f"{bad} of {len(rows)} feature rows are not finite; leave such images out first")
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= BLOCK:
            rows = torch.cat(self._waiting)
            end = len(rows) // BLOCK * BLOCK
            self._parts = _fold(self._parts, rows[:end])
            self._waiting = [rows[end:]]

    def parts(self) -> "Parts":
        """(count, mean [d], scatter [d, d]) of all rows so far. Looking does not change what comes after."""
        return _fold(self._parts, torch.cat(self._waiting)) if self._waiting else self._parts

    def merge(self, other: "FeatureStatistics") -> None:
        """Take in another stream; for equal bits, merge the same streams in the same order."""
        if other.dim != self.dim:
            raise EvaluationError(f"cannot merge statistics of {self.dim} and {other.dim} features")
        self._parts = _join(self.parts(), other.parts())
        self._waiting = []

    @property
    def count(self) -> int:
        """Rows taken in."""
        return self._parts[0] + sum(map(len, self._waiting))

    @classmethod
    def from_parts(cls, count: int, mean: np.ndarray, scatter: np.ndarray) -> "FeatureStatistics":
        """The stream whose `parts()` were these."""
        statistics = cls(len(mean))
        statistics._parts = (int(count), torch.as_tensor(mean), torch.as_tensor(scatter))
        return statistics


Parts = tuple[int, Tensor, Tensor]


def _fold(parts: Parts, rows: Tensor) -> Parts:
    for block in rows.split(BLOCK):
        mean = block.mean(dim=0)
        centred = block - mean
        parts = _join(parts, (len(block), mean, centred.T @ centred))
    return parts


def _join(ours: Parts, theirs: Parts) -> Parts:
    """Pairwise update of (count, mean, scatter) (Chan, Golub & LeVeque 1979)."""
    if ours[0] == 0 or theirs[0] == 0:
        return theirs if ours[0] == 0 else ours
    total = ours[0] + theirs[0]
    delta = theirs[1] - ours[1]
    scatter = ours[2] + theirs[2] + torch.outer(delta, delta) * (ours[0] * theirs[0] / total)
    return total, ours[1] + delta * (theirs[0] / total), scatter


@dataclass(frozen=True)
class FrechetResult:
    """distance = mean_term + covariance_term, and what to know before believing it."""

    distance: float
    mean_term: float
    covariance_term: float
    warnings: list[str] = field(default_factory=list)


def frechet_distance(
    first: FeatureStatistics, second: FeatureStatistics, names: tuple[str, str] = ("first", "second")
) -> FrechetResult:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): real, finite and never negative.

    Raises EvaluationError under two images on a side. With no more images than features a covariance is singular: the
    result is finite all the same and says so in `warnings`, calling the sides by their `names`.
    """
    if first.dim != second.dim:
        raise EvaluationError(f"cannot compare {first.dim} features with {second.dim}: use one network for both")
    warnings = []
    means, roots, traces = [], [], 0.0
    for name, (count, mean, scatter) in zip(names, (first.parts(), second.parts())):
        if count < 2:
            raise EvaluationError(
                f"a Frechet distance needs at least 2 images on each side; the {name} side has {count}"
            )
        if count <= first.dim:
            warnings.append(
                f"{count} {name} images for {first.dim} features: their covariance is singular and the distance too "
                "large; compare it only with distances of equally many images"
            )
        covariance = scatter / (count - 1)
        traces += float(covariance.trace())
        means.append(mean)
        roots.append(_root(covariance))
    mean_term = float((means[0] - means[1]).square().sum())
    # tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2). Singular values err by one rounding of
    # the largest; square roots of the eigenvalues of C1 C2 would err by the root of that (1e-8 instead of 1e-16).
    cross = float(torch.linalg.svdvals(roots[0].T @ roots[1]).sum())
    covariance_term = max(traces - 2 * cross, 0.0)
    return FrechetResult(mean_term + covariance_term, mean_term, covariance_term, warnings)


def _root(covariance: Tensor) -> Tensor:
    """R [d, r] with R R^T = C, from the eigenvalues of a symmetric matrix; r is its numerical rank.

    Eigenvalues below d roundings of the largest cannot be told from zero; their roots would be noise of size 1e-8.
    """
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    floor = len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    keep = values > floor
    return vectors[:, keep] * values[keep].sqrt()
