"""All metrics of one set of images against reference statistics, for results and for `tarflow score`.

The Frechet distance uses the sums of all images; kernel distance, precision, recall, density, coverage, the Inception
score and the distance's error bar use the features that were kept (10,000 a side, unless set otherwise).
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from tarflow.evaluation.metrics.frechet_distance import UNCOUNTED, FeatureStatistics, FrechetInfluence, frechet_distance
from tarflow.evaluation.metrics.inception_score import InceptionScore
from tarflow.evaluation.metrics.kernel_distance import ALL_PAIRS, kernel_distance
from tarflow.evaluation.metrics.names import distance_key, kernel_key, spatial_key
from tarflow.evaluation.metrics.precision_recall import K_COVERAGE, manifold_scores

SUSPICIOUS = 0.01  # share of the distance between two independent sets that are alike


class Network(Protocol):
    """What the metrics need of a feature network; `features.Features` implements it."""

    name: str
    warnings: list[str]

    @property
    def num_classes(self) -> int:
        """Classes that it tells apart; 0 if it only has features."""

    def probabilities(self, features: Tensor) -> Tensor:
        """Features [n, d] to class probabilities [n, num_classes]."""


def feature_scores(
    network: Network,
    statistics: FeatureStatistics,
    rows: Tensor,
    reference: FeatureStatistics,
    reference_rows: Tensor,
    names: tuple[str, str] = ("sampled", "reference"),
    parts: Iterable[FeatureStatistics] = (),
) -> dict[str, Any]:
    """Metrics by name.

    `rows` [n, d] and `reference_rows` [m, d] are the features kept of each side, possibly none; `parts`: statistics of
    disjoint parts of the first side, for the error bar where no features were kept. A metric that needs more rows than
    there are is left out. Raises EvaluationError below two images on a side.
    """
    found = frechet_distance(statistics, reference, names)
    out: dict[str, Any] = {
        distance_key(network.name): found.distance,
        "distance_terms": {"mean_term": found.mean_term, "covariance_term": found.covariance_term},
        "distance_stderr": None,
        "warnings": [*network.warnings, *found.warnings],
    }
    # Two independent sets that are alike still differ by chance: a much smaller distance means shared images.
    if found.distance < SUSPICIOUS * found.by_chance:
        others = "" if reference.count == UNCOUNTED else f" and {reference.count:,}"
        out["warnings"].append(
            f"the distance {found.distance:.2g} is suspiciously small: independent sets of {statistics.count:,}{others} "
            f"images of one kind differ by {found.by_chance:.2g} or more; are the {names[0]} images those of the {names[1]}?"
        )
    out["distance_stderr"] = _stderr(statistics, reference, rows, parts)
    # Metrics of pairs of images need features on both sides.
    fewer = min(len(rows), len(reference_rows))
    if fewer >= 2:
        kernel = kernel_distance(rows, reference_rows)
        out |= {kernel_key(network.name): kernel.distance, "kernel_stderr": kernel.stderr, "kernel_estimate": ALL_PAIRS}
    if fewer > K_COVERAGE:
        out |= vars(manifold_scores(rows, reference_rows))
    if network.num_classes and len(rows):
        score = InceptionScore(network.num_classes, len(rows))
        for positions in torch.arange(len(rows)).split(1000):
            score.add(positions, network.probabilities(rows[positions]))
        out["inception_score"], out["inception_score_std"] = score.result()
    return out | {"kept_features": [len(rows), len(reference_rows)]}


def spatial_scores(
    network: Network,
    statistics: FeatureStatistics,
    reference: FeatureStatistics | None,
    rows: Tensor | None = None,
    parts: Iterable[FeatureStatistics] = (),
) -> dict[str, Any]:
    """The distance of spatial features (sFID), from the same sums as the Frechet distance, and its error bar.

    Empty where the network has no such features. A reference that holds none (None) gives the value None.
    """
    if not statistics.dim:
        return {}
    if reference is None:
        return {spatial_key(network.name): None, "spatial_stderr": None}
    distance = frechet_distance(statistics, reference).distance
    kept = torch.empty(0, statistics.dim) if rows is None else rows
    return {
        spatial_key(network.name): distance,
        "spatial_stderr": _stderr(statistics, reference, kept, parts),
    }


def _stderr(
    statistics: FeatureStatistics, reference: FeatureStatistics, rows: Tensor, parts: Iterable[FeatureStatistics]
) -> float | None:
    """From the features kept, else from the spread between parts, if there are at least two."""
    if len(rows) >= 2:
        return FrechetInfluence(statistics, reference).stderr(rows)
    if (first := next(rest := iter(parts), None)) is not None and first.count < statistics.count:
        return FrechetInfluence(statistics, reference).stderr_of_parts(chain([first], rest))
    return None
