"""Successive halving (Jamieson & Talwalkar, arXiv 1502.07943): bad candidates are dropped on few samples.

All candidates of a round are scored on equally many samples with the same noise, so that few samples mislead all of them
alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.sweep.choice import Point


@dataclass(frozen=True)
class Round:
    """The candidates of one round, best first."""

    num_samples: int
    points: list[Point]


def successive_halving(
    candidates: Sequence[ResolvedSampling], num_samples: Sequence[int], score: Callable[[ResolvedSampling, int], Point]
) -> list[Round]:
    """A round for each of `num_samples`; the better half of the candidates reaches the next one."""
    rounds = []
    for number in num_samples:
        scored = [(score(candidate, number), candidate) for candidate in candidates]
        scored.sort(key=lambda pair: pair[0].order)
        rounds.append(Round(number, [point for point, _ in scored]))
        candidates = [candidate for _, candidate in scored[: math.ceil(len(scored) / 2)]]
    return rounds


def samples_per_round(candidates: int, start: int, final: int) -> list[int]:
    """Samples of each round until two candidates are left: from `start` to `final` by equal factors.

    All but the last are multiples of `start`, so that a round reuses the chunks of the one before.
    """
    rounds = max(math.ceil(math.log2(candidates)), 1)
    if rounds == 1:
        return [final]
    growth = (final / start) ** (1 / (rounds - 1))
    between = [round(growth**i) * start for i in range(rounds - 1)]
    return [*(min(number, final) for number in between), final]
