"""Frechet distance between two clouds of features (Heusel et al., arXiv 1706.08500, equation 6).

Everything is float64. Statistics are accumulated in blocks of fixed size, so adding 1, 7 or 1000 rows at a time gives
the same bits, and they are centred as they grow, so a mean of 1e4 costs no digits. Two streams can be merged.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError

BLOCK = 256  # rows accumulated at once: fixed, so that sums do not depend on the batch size
UNCOUNTED = 10**12
ENOUGH = 10_000  # images on a side; below that, a warning says that the distance is biased
_EPS = torch.finfo(torch.float64).eps
_NEGLIGIBLE = 1e-10  # relative error of a trace that is accepted


class FeatureStatistics:
    """Count, mean [d] and scatter matrix [d, d] (sum of outer products about the mean) of rows of features."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        zero = torch.zeros(dim, dtype=torch.float64)
        self._parts: Parts = (0, zero, torch.outer(zero, zero))
        self._pending: list[Tensor] = []
        self._spectrum: Spectrum | None = None  # of the rows so far, once somebody has asked for it

    def add(self, features: Tensor | NDArray[np.float64]) -> None:
        """Add rows [n, d] of any float dtype. A row that is not finite is an error: it would make every sum NaN."""
        rows = torch.as_tensor(features).detach().to("cpu", torch.float64)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise EvaluationError(f"features must have shape [n, {self.dim}], got {list(rows.shape)}")
        if not torch.isfinite(rows).all():
            bad = int((~torch.isfinite(rows).all(dim=1)).sum())
            raise EvaluationError(f"{bad} of {len(rows)} feature rows are not finite; leave such images out first")
        self._pending.append(rows)
        self._spectrum = None
        if sum(map(len, self._pending)) >= BLOCK:
            rows = torch.cat(self._pending)
            end = len(rows) // BLOCK * BLOCK
            self._parts = _fold(self._parts, rows[:end])
            self._pending = [rows[end:]]

    def parts(self) -> "Parts":
        """(count, mean [d], scatter [d, d]) of all rows so far; the stream itself is unchanged."""
        return _fold(self._parts, torch.cat(self._pending)) if self._pending else self._parts

    def merge(self, other: "FeatureStatistics") -> None:
        """Add another stream; for equal bits, merge the same streams in the same order."""
        if other.dim != self.dim:
            raise EvaluationError(f"cannot merge statistics of {self.dim} and {other.dim} features")
        self._parts = _join(self.parts(), other.parts())
        self._pending = []
        self._spectrum = None

    def spectrum(self) -> "Spectrum":
        """Eigenvalues [r] and eigenvectors [d, r] of the covariance, without those that are zero.

        Kept: a distance and its error bar ask for the same, and a sweep measures every candidate against one reference.
        """
        if self._spectrum is None:
            count, _, scatter = self.parts()
            self._spectrum = _spectrum(scatter / (count - 1))
        return self._spectrum

    @property
    def count(self) -> int:
        """Rows added so far."""
        return self._parts[0] + sum(map(len, self._pending))

    @classmethod
    def from_parts(cls, count: int, mean: NDArray[np.float64], scatter: NDArray[np.float64]) -> "FeatureStatistics":
        """The stream whose `parts()` were these."""
        statistics = cls(len(mean))
        statistics._parts = (int(count), torch.as_tensor(mean), torch.as_tensor(scatter))
        return statistics

    @classmethod
    def of_moments(
        cls, mean: NDArray[np.float64], covariance: NDArray[np.float64], count: int | None = None
    ) -> "FeatureStatistics":
        """From mean and unbiased covariance. `count` None: not recorded; then treated as exact, without sampling noise."""
        number = UNCOUNTED if count is None else count
        return cls.from_parts(number, mean, covariance * (number - 1))


Parts = tuple[int, Tensor, Tensor]
Spectrum = tuple[Tensor, Tensor]


def _fold(parts: Parts, rows: Tensor) -> Parts:
    # On one thread: how a product is split between threads decides its last bits, and processes may have any number.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for block in rows.split(BLOCK):
            mean = block.mean(dim=0)
            centred = block - mean
            parts = _join(parts, (len(block), mean, centred.T @ centred))
    finally:
        torch.set_num_threads(threads)
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
    """distance = mean_term + covariance_term, with caveats in `warnings`.

    `by_chance`: the mean term expected between two independent sets of that many like images.
    """

    distance: float
    mean_term: float
    covariance_term: float
    warnings: list[str] = field(default_factory=list)
    by_chance: float = 0.0


def frechet_distance(
    first: FeatureStatistics, second: FeatureStatistics, names: tuple[str, str] = ("first", "second")
) -> FrechetResult:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): real, finite and never negative.

    Few images make the distance too large; with no more images than features the covariance is even singular. The result
    is finite anyway, and `warnings` names the side by its entry in `names`. Raises EvaluationError below two images on a
    side.
    """
    if first.dim != second.dim:
        raise EvaluationError(f"cannot compare {first.dim} features with {second.dim}: use one network for both")
    warnings, means, covariances = [], [], []
    for name, (count, mean, scatter) in zip(names, (first.parts(), second.parts())):
        if count < 2:
            raise EvaluationError(
                f"a Frechet distance needs at least 2 images on each side; the {name} side has {count}"
            )
        warnings += _too_few(count, first.dim, name)
        means.append(mean)
        covariances.append(scatter / (count - 1))
    mean_term = float((means[0] - means[1]).square().sum())
    traces = sum(float(c.trace()) for c in covariances)
    trace = _trace_of_root_if_regular(*covariances)
    if trace is None:
        trace = float(torch.linalg.svdvals(_root(first.spectrum()).T @ _root(second.spectrum())).sum())
    covariance_term = max(traces - 2 * trace, 0.0)
    by_chance = sum(float(c.trace()) / count for c, count in zip(covariances, (first.count, second.count)))
    return FrechetResult(mean_term + covariance_term, mean_term, covariance_term, warnings, by_chance)


def _too_few(count: int, dim: int, name: str) -> list[str]:
    if count <= dim:
        return [
            f"{count} {name} images for {dim} features: their covariance is singular and the distance too large; "
            "compare it only with distances of equally many images"
        ]
    if count < ENOUGH:
        return [
            f"{count:,} {name} images, fewer than {ENOUGH:,}: the distance is too large by an amount that shrinks with "
            "their number; compare it only with distances of equally many images"
        ]
    return []


def _trace_of_root_if_regular(first: Tensor, second: Tensor) -> float | None:
    """Tr (C1 C2)^(1/2) of symmetric, positive semidefinite [d, d], unless that would lose digits.

    With C1 = L L^T the eigenvalues of C1 C2 are those of the symmetric L^T C2 L. Their error is one rounding of the
    largest, and that of their roots is this divided by twice the root: too much where some are near zero. There one takes
    the sum of the singular values of C1^(1/2) C2^(1/2), the same number, whose error is a few roundings of the largest,
    at three times the time.
    """
    lower, failed = torch.linalg.cholesky_ex(first)
    if not failed:
        values = torch.linalg.eigvalsh(lower.T @ second @ lower)
        if values[0] > 0:
            roots = values.sqrt()
            error = len(values) ** 0.5 * _EPS * float((values[-1] / (2 * roots)).sum())
            if error <= _NEGLIGIBLE * float(roots.sum()):
                return float(roots.sum())
    return None


def _root(spectrum: Spectrum) -> Tensor:
    """R [d, r] with R R^T = C; r is the numerical rank of C."""
    values, vectors = spectrum
    return vectors * values.sqrt()


def _spectrum(covariance: Tensor) -> Spectrum:
    """Eigenvalues [r] and eigenvectors [d, r] of a symmetric matrix, without those that are zero.

    Eigenvalues below d roundings of the largest are indistinguishable from zero; their roots would be noise of 1e-8.
    """
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    keep = values > len(values) * _EPS * values[-1].clamp(min=0)
    return values[keep], vectors[:, keep]


class FrechetInfluence:
    """How much each row of the first side moves the distance: gives its error bar without drawing samples again.

    The first-order influence of a row x on the distance is 2 (m1 - m2).(x - m1) + (x - m1)^T (I - T) (x - m1) minus its
    mean, where T = C1^(-1/2) (C1^(1/2) C2 C1^(1/2))^(1/2) C1^(-1/2) maps one covariance to the other (the gradient
    of the Bures distance; an infinitesimal jackknife, Efron 1981). The second side is taken as exact. The error bar does
    not include the bias of few images, which `frechet_distance` warns of.
    """

    def __init__(self, first: FeatureStatistics, second: FeatureStatistics) -> None:
        self.count, self._mean, _ = first.parts()
        _, other_mean, other_scatter = second.parts()
        self._slope = 2 * (self._mean - other_mean)
        values, vectors = first.spectrum()
        root = _root(first.spectrum())
        inner, axes = _spectrum(root.T @ (other_scatter / (second.count - 1)) @ root)
        # T = K K^T
        self._map = (vectors / values.sqrt()) @ (axes * inner.sqrt().sqrt())

    def of_rows(self, rows: Tensor | NDArray[np.float64]) -> Tensor:
        """Rows [m, d] of the first side -> float64 [m], before the mean is subtracted."""
        centred = torch.as_tensor(rows).double() - self._mean
        return centred @ self._slope + centred.square().sum(dim=1) - (centred @ self._map).square().sum(dim=1)

    def stderr(self, rows: Tensor | NDArray[np.float64]) -> float:
        """Standard error of the distance, from some rows of the first side (1,000 or more are accurate to a few percent)."""
        return float(self.of_rows(rows).std()) / self.count**0.5

    def stderr_of_parts(self, parts: Iterable[FeatureStatistics]) -> float:
        """The same from the statistics of disjoint parts that make up the first side (ten or more), without rows."""
        # The influence is quadratic in a row, so that its sum over a part follows from the part's mean and scatter.
        sums = []
        for count, mean, scatter in (part.parts() for part in parts if part.count):
            shift = mean - self._mean
            spread = scatter + count * torch.outer(shift, shift)
            mapped = float((self._map.T @ spread @ self._map).trace())
            sums.append((count, count * float(shift @ self._slope) + float(spread.trace()) - mapped))
        if len(sums) < 2:
            raise EvaluationError("the error bar of a distance needs at least two parts")
        total = sum(count for count, _ in sums)
        mean_influence = sum(value for _, value in sums) / total
        squares = sum((value - count * mean_influence) ** 2 for count, value in sums)
        return (squares * len(sums) / (len(sums) - 1)) ** 0.5 / total
