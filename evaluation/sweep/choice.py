"""Whether a sweep's best candidate is clearly the best: standard errors, and the ends of the range tried."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tarflow.evaluation.sweep_file import shown_blocks

NOISE = 2.0  # standard errors of their difference within which two candidates are indistinguishable
RANGES = (
    "guidance",
    "denoise",
    "attn_temp",
    "noise_level",
    "denoise_steps",
)  # settings that are numbers, which could be larger or smaller
MIN_RANGE = 3  # values of a setting that make a range, which has ends; two are alternatives


@dataclass(frozen=True)
class Point:
    """The score of one candidate in one round."""

    guidance: float
    denoise: float
    attn_temp: float
    distance: float | None  # None where too many samples were lost
    lost: int = 0
    count: int = 0  # samples behind the distance
    # How much each of the first samples moves the distance (see FrechetInfluence); None for one that was lost.
    influence: Sequence[float | None] = field(default=(), repr=False)
    guidance_form: str | None = None  # None: not varied, as the blocks below
    guide_blocks: tuple[int, ...] | None = None
    noise_level: float | None = None
    denoise_steps: int | None = None

    @property
    def order(self) -> tuple[float, float, float, float]:
        """Best first; ties go to the weakest setting."""
        distance = math.inf if self.distance is None else self.distance
        return distance, self.guidance, self.denoise, self.attn_temp

    @property
    def settings(self) -> dict[str, Any]:
        """What the sweep varies, by name."""
        found: dict[str, Any] = {"guidance": self.guidance, "denoise": self.denoise, "attn_temp": self.attn_temp}
        if self.guidance_form is not None:
            found["guidance_form"] = self.guidance_form
        if self.guide_blocks is not None:
            found["guide_blocks"] = list(self.guide_blocks)
        iterative = {"noise_level": self.noise_level, "denoise_steps": self.denoise_steps}
        return found | {name: value for name, value in iterative.items() if value is not None}

    @property
    def stderr(self) -> float | None:
        """Standard error of the distance."""
        return _stderr([value for value in self.influence if value is not None], self.count)

    def __str__(self) -> str:
        form = f", {self.guidance_form} form" if self.guidance_form is not None else ""
        blocks = f", blocks {shown_blocks(self.guide_blocks)}" if self.guide_blocks is not None else ""
        level = f", noise level {self.noise_level:g}" if self.noise_level is not None else ""
        steps = f", {self.denoise_steps} steps" if self.denoise_steps is not None else ""
        return (
            f"guidance {self.guidance:g}, denoise {self.denoise:g}, attention temperature {self.attn_temp:g}{form}{blocks}"
            f"{level}{steps}"
        )


def with_error(value: float, stderr: float | None) -> str:
    """A distance with its standard error, where that is known."""
    return f"{value:.2f}" + (f" ± {stderr:.2f}" if stderr is not None else "")


def difference_stderr(one: Point, other: Point) -> float | None:
    """Standard error of the difference of two distances.

    All candidates see the same noise, so the samples come in pairs, and what moves both distances alike cancels.
    """
    pairs = zip(one.influence, other.influence)
    return _stderr([a - b for a, b in pairs if a is not None and b is not None], min(one.count, other.count))


def _stderr(values: Sequence[float], count: int) -> float | None:
    """Of a mean over `count` samples, from the influence of some; six digits, so that equal work gives equal files."""
    return float(f"{statistics.stdev(values) / math.sqrt(count):.6g}") if len(values) > 1 else None


def why_unclear(tried: Sequence[Point], last: Sequence[Point]) -> list[str]:
    """Reasons against choosing the best candidate of the last round automatically; none if it is clear."""
    best, *others = sorted(last, key=lambda point: point.order)
    return [*_within_noise(best, others), *_at_an_end(best, tried)]


def _within_noise(best: Point, others: Sequence[Point]) -> list[str]:
    reasons = []
    for other in others:
        if other.distance is None or best.distance is None:
            continue
        error, difference = difference_stderr(best, other), other.distance - best.distance
        if error is None or difference <= NOISE * error:
            shown = f"{difference:.2f} ± {error:.2f}" if error is not None else f"{difference:.2f}"
            reasons.append(
                f"{other} is as good within the noise: {with_error(other.distance, other.stderr)}, a difference of {shown}; "
                "more samples (--final) may tell them apart"
            )
    return reasons


def _at_an_end(best: Point, tried: Sequence[Point]) -> list[str]:
    reasons = []
    for name in (name for name in RANGES if name in best.settings):
        value = best.settings[name]
        values = {point.settings[name] for point in tried}
        if (
            len(values) < MIN_RANGE or value not in (min(values), max(values)) or value == 0
        ):  # there is nothing below zero
            continue
        end = "largest" if value == max(values) else "smallest"
        further = "larger" if value == max(values) else "smaller"
        option = "--" + name.replace("_", "-")
        reasons.append(f"{name} {value:g} is the {end} that was tried: {further} ones may be better still ({option})")
    return reasons
