"""Frechet distance of 2,048 features: symmetric eigenvalues against the matrix square root of scipy, in one run.

    python -m benchmarks.frechet [--quick] [--check]

Statistics like those of a feature network that saw 50,000 images: full rank, eigenvalues over three powers of ten, two
covariances that do not commute. Both sides use the same threads and alternate.
"""

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from benchmarks.common import Bar, finish, parse_args
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics, FrechetInfluence, frechet_distance

FASTER = 4.0
AGREE = 1e-6


Moments = tuple[NDArray[np.float64], NDArray[np.float64]]  # mean [d], covariance [d, d]


def moments(dim: int, seed: int) -> Moments:
    """A mean [d] and a covariance [d, d] with eigenvalues from 0.01 to 10."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    covariance = (axes * np.geomspace(0.01, 10, dim)) @ axes.T
    return rng.standard_normal(dim) * 0.1, (covariance + covariance.T) / 2


def by_square_root(first: Moments, second: Moments) -> float:
    """The formula as it is usually written."""
    (m1, c1), (m2, c2) = first, second
    root = scipy.linalg.sqrtm(c1 @ c2)
    return float(((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(root).real)


def timed(call: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    value = call()
    return value, time.perf_counter() - start


def main() -> int:
    args = parse_args(__doc__.splitlines()[0])
    dim, rounds = (512, 2) if args.quick else (2048, 3)
    sides = [moments(dim, seed) for seed in (1, 2)]
    ours = [FeatureStatistics.from_parts(50_000, mean, covariance * 49_999) for mean, covariance in sides]
    frechet_distance(ours[0], ours[1])  # the first call of a library costs more
    scipy_s, our_s, bar_s = [], [], []
    for _ in range(rounds):
        found, seconds = timed(lambda: frechet_distance(ours[0], ours[1]).distance)
        our_s.append(seconds)
        wanted, seconds = timed(lambda: by_square_root(*sides))
        scipy_s.append(seconds)
        bar_s.append(timed(lambda: FrechetInfluence(*ours).stderr(np.tile(sides[0][0], (1000, 1))))[1])
    difference = abs(found - wanted) / wanted
    rows = [
        ("scipy.linalg.sqrtm", statistics.median(scipy_s), wanted),
        ("symmetric eigenvalues", statistics.median(our_s), found),
        ("error bar on top", statistics.median(bar_s), ""),
    ]
    bars = [
        Bar("relative difference", difference, at_most=AGREE, reason="two ways to one number in float64"),
        Bar("times as fast", statistics.median(scipy_s) / statistics.median(our_s), at_least=FASTER,
            reason="no Schur form of an unsymmetric matrix"),
    ]  # fmt: skip
    return finish(args, rows, (f"{dim} features", "seconds", "distance"), bars, packages=("torch", "numpy", "scipy"))


if __name__ == "__main__":
    sys.exit(main())
