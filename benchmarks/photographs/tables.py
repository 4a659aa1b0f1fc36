"""What came out, as rows and as Markdown."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.photographs.scores import Score, mean_bits
from benchmarks.photographs.training import Taken

HEADER = (
    "size",
    "arm",
    "images",
    "CPU min",
    "slices",
    "bits/dim",
    "+-",
    "tiles",
    "distance",
    "+-",
    "samples",
    "nearest",
)


@dataclass(frozen=True)
class Result:
    """One arm at one size: what it took, its checkpoints' scores (the last is the final one), and bits of held-out tiles."""

    arm: str
    size: int
    images: int
    taken: Taken
    scores: list[Score]
    bits: dict[str, float]

    def distance_from(self, base: "Result") -> tuple[float | None, float | None]:
        """The difference of the final distances, and its standard error: their samples are independent."""
        ours, theirs = self.scores[-1], base.scores[-1]
        if ours.distance is None or theirs.distance is None:
            return None, None
        errors = ours.distance_stderr or 0.0, theirs.distance_stderr or 0.0
        return ours.distance - theirs.distance, math.hypot(*errors)

    def record(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return asdict(self) | {"bits_per_dim": [None if math.isnan(x) else x for x in mean_bits(self.bits)]}


def result_rows(results: Iterable[Result]) -> list[tuple[Any, ...]]:
    """One row for each arm and size, as in HEADER. `nearest`: median distance of samples to training images, grey levels."""
    return [
        (r.size, r.arm, r.images, r.taken.cpu_s / 60, r.taken.slices, *mean_bits(r.bits), len(r.bits),
         (last := r.scores[-1]).distance, last.distance_stderr, last.samples, last.neighbour_rms)
        for r in results
    ]  # fmt: skip


def curve_rows(results: Iterable[Result]) -> list[tuple[Any, ...]]:
    """The distance of every checkpoint."""
    return [(r.size, r.arm, s.images, s.samples, s.distance, s.distance_stderr) for r in results for s in r.scores]


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers with four significant digits, what is not there as a dash."""
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
