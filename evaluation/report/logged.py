"""Reads metrics.jsonl, the log of a training run. Does not import torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tarflow.records import read_lines

METRICS = "metrics.jsonl"
LARGEST = 1e38  # metrics are float32, so anything beyond is not one


@dataclass
class Logged:
    """The lines of a run: each has `step` and `images_seen`, and either metrics by name (or null) or an `event`."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    flaws: list[str] = field(default_factory=list)  # what was damaged, as text


def read_metrics(run_dir: Path, tail: int | None = None) -> Logged:
    """All lines, or those within the last `tail` bytes; damaged ones are skipped and named in `flaws`.

    Raises DamagedFileError if the path is not a regular file, and OSError if it cannot be read.
    """
    path = run_dir / METRICS
    lines = read_lines(path, tail)
    rows = [row for row in lines.rows if _fits(row)]
    flaws = []
    if lines.damaged:
        flaws.append(f"{path}: {lines if tail is None else 'damaged lines are left out'}")
    if len(rows) < len(lines.rows):
        flaws.append(f"{path}: {len(lines.rows) - len(rows)} lines that are not metrics of a training run are left out")
    return Logged(rows, flaws)


def _fits(row: dict[str, Any]) -> bool:
    if not all(_is_count(row.get(key)) for key in ("step", "images_seen")):
        return False
    if "event" in row:
        return isinstance(row["event"], str)
    return all(_is_figure(value) for value in row.values())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST)
