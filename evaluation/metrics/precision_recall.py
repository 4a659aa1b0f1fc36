"""Are samples like real images, and are all real images covered: two pairs of metrics from nearest neighbours.

A real (or sampled) image stands for the ball around it that reaches to its k-th neighbour on its own side.
Precision: share of samples in some real ball; recall: share of real images in some ball of samples (Kynkaanniemi et al.,
arXiv 1904.06991). Density: real balls that a sample lies in, on average, over k; coverage: share of real balls with a
sample inside (Naeem et al., arXiv 2002.09797). Both compare well only between equal numbers of images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError

K_PRECISION, K_COVERAGE = 3, 5  # as published
BLOCK = 1000  # rows of a distance matrix held at once


@dataclass(frozen=True)
class ManifoldResult:
    """Shares in 0..1; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(
    sampled: Tensor, real: Tensor, k_precision: int = K_PRECISION, k_coverage: int = K_COVERAGE
) -> ManifoldResult:
    """Features [n, d] and [m, d] -> the four metrics. Memory beyond the features: blocks of 1,000 x max(n, m) float64.

    Distances on the rim count as inside. Raises EvaluationError unless a side has more images than neighbours.
    """
    most = max(k_precision, k_coverage)
    if sampled.shape[1] != real.shape[1]:
        raise EvaluationError(f"cannot compare {sampled.shape[1]} features with {real.shape[1]}: use one network")
    if min(len(sampled), len(real)) <= most:
        raise EvaluationError(
            f"precision, recall, density and coverage need more than {most} images on each side, "
            f"got {len(sampled)} and {len(real)}"
        )
    # Centred, so that squares cost no digits.
    centre = real.double().mean(dim=0)
    ours, theirs = sampled.double() - centre, real.double() - centre
    (real_precision, real_coverage) = _radii(theirs, (k_precision, k_coverage))
    (sampled_radius,) = _radii(ours, (k_precision,))
    inside = 0  # samples in some real ball
    visits = 0  # pairs (sample, real ball with the sample inside)
    covered = torch.zeros(len(real), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for start in range(0, len(ours), BLOCK):
        distances = _squares(ours[start : start + BLOCK], theirs)
        inside += int((distances <= real_precision).any(dim=1).sum())
        hits = distances <= real_coverage
        visits += int(hits.sum())
        covered |= hits.any(dim=0)
        recalled |= (distances <= sampled_radius[start : start + BLOCK].unsqueeze(1)).any(dim=0)
    return ManifoldResult(
        precision=inside / len(sampled),
        recall=float(recalled.double().mean()),
        density=visits / (k_coverage * len(sampled)),
        coverage=float(covered.double().mean()),
    )


def _radii(rows: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Squared distance of each row to its k-th nearest other row, for each k."""
    found: list[list[Tensor]] = [[] for _ in ks]
    for start in range(0, len(rows), BLOCK):
        distances = _squares(rows[start : start + BLOCK], rows)
        own = torch.arange(len(distances))
        distances[own, start + own] = torch.inf  # not itself
        nearest = distances.topk(max(ks), dim=1, largest=False).values
        for radii, k in zip(found, ks):
            radii.append(nearest[:, k - 1])
    return [torch.cat(radii) for radii in found]


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [n, m]."""
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)
