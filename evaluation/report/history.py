"""The history of a run: metrics.jsonl stitched over all restarts, and the results.

Damaged parts are skipped and named in `History.flaws`; the rest is kept.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tarflow.errors import noted
from tarflow.evaluation.metrics.names import is_distance
from tarflow.evaluation.report.logged import Logged, read_metrics
from tarflow.evaluation.results import scan
from tarflow.evaluation.sweep_file import RECORD, load_sweep
from tarflow.files import listed
from tarflow.models.sampling.settings import LATER
from tarflow.records import read_object
from tarflow.trainer.checkpoint.names import is_checkpoint_name

Point = tuple[float, float]
# Sampling settings that results of earlier versions do not name, and neither do those that leave them at their default.
_UNNAMED = {name: list(value) if isinstance(value, tuple) else value for name, value in LATER.items()}


@dataclass
class Result:
    """A result and its directory, which holds its pictures."""

    folder: Path
    values: dict[str, Any]

    @property
    def images_seen(self) -> int:
        """By the run when it wrote the weights; 0 if a weights file does not say."""
        return int(self.values["images_seen"] or 0)

    @property
    def plain(self) -> bool:
        """Whether its settings were the run's own when it was made (its directory's name has no hash)."""
        return is_checkpoint_name(self.folder.name)

    @property
    def published(self) -> float:
        """Unix time at which it was finished; 0 if not recorded."""
        return float(self.values.get("time") or 0)

    @property
    def sampling(self) -> dict[str, Any]:
        """Its sampling settings, as stored; with defaults for those that it does not name."""
        return _UNNAMED | dict(self.values["settings"]["sampling"])

    @property
    def step_known(self) -> bool:
        """Whether it belongs to a checkpoint of the run (a weights file may not know its step)."""
        return self.values["step"] is not None

    @property
    def distance(self) -> tuple[str, float | None]:
        """(name, value) of the Frechet distance; the value is None if it could not be computed."""
        for key, value in self.values.items():
            if is_distance(key):
                return key, value
        return "fd", None

    @property
    def histogram(self) -> tuple[float, float, list[float]] | None:
        """(from, to, share of images by bin): held-out images by bits per dimension; None if a result has none."""
        found = self.values["likelihood"].get("histogram")
        try:
            low, high, counts = float(found["from"]), float(found["to"]), [int(count) for count in found["counts"]]
        except (TypeError, KeyError, ValueError, OverflowError):
            return None
        total = sum(counts)
        fits = low < high and math.isfinite(high - low) and min(counts, default=-1) >= 0 and total > 0
        return (low, high, [count / total for count in counts]) if fits else None

    def picture(self, name: str) -> Path | None:
        """Path of a picture of the result; None if it has none."""
        path = self.folder / name
        return path if path.is_file() else None


def _apart_from(result: Result, key: str) -> dict[str, Any]:
    """Settings of a result without one setting of the section sampling."""
    return result.values["settings"] | {"sampling": {k: v for k, v in result.sampling.items() if k != key}}


@dataclass
class History:
    """What a run logged: rows of metrics by images seen, where it was restarted, and its results."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)  # images seen at each resume
    results: list[Result] = field(default_factory=list)
    images_seen: int = 0  # at the last line of metrics.jsonl
    classes: list[str] = field(default_factory=list)  # names by label; empty if the data have none
    sweeps: list[dict[str, Any]] = field(default_factory=list)  # what `tarflow sweep-guidance` recorded, by name
    flaws: list[str] = field(default_factory=list)  # what was damaged and skipped, as text

    def series(self, name: str) -> list[Point]:
        """(images seen, value) of one metric; rows without it, or with a non-finite value, are skipped."""
        points = []
        for row in self.rows:
            value = row.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                points.append((float(row["images_seen"]), float(value)))
        return points

    @property
    def training_seconds(self) -> float:
        """Seconds spent in training steps, from throughput; time between restarts and repeated steps do not count."""
        seconds, before = 0.0, 0.0
        for images, rate in self.series("throughput/images_per_sec"):
            seconds += (images - before) / rate if rate > 0 else 0.0
            before = images
        return seconds

    def over(self, setting: str) -> dict[str, list[tuple[float, Result]]]:
        """Results that differ in one sampling setting alone, as (its value, result), by weights and images seen."""
        groups: dict[str, list[tuple[float, Result]]] = {}
        for result in self.results:
            if result.sampling[setting] is None:  # a model that is not told noise levels has none
                continue
            rest = _apart_from(result, setting)
            key = json.dumps([result.values.get("step"), rest], sort_keys=True)
            groups.setdefault(key, []).append((float(result.sampling[setting]), result))
        curves: dict[str, list[tuple[float, Result]]] = {}
        for group in groups.values():
            if len({value for value, _ in group}) > 1:
                first = group[0][1]
                name = f"{first.values['weights']} at {first.images_seen:,}"
                curves[f"{name} ({len(curves) + 1})" if name in curves else name] = sorted(group, key=lambda p: p[0])
        return curves


def read_history(run_dir: Path) -> History:
    """Read the history of a run. Steps repeated after a restart count once: the last attempt replaces the earlier ones."""
    history, logged = History(), Logged()
    with noted(history.flaws):
        logged = read_metrics(run_dir)
    for row in logged.rows:
        images = row["images_seen"]
        history.images_seen = images
        event = row.get("event")
        # A resume continues from a checkpoint: rows after it are of steps that are repeated from here on.
        if event in ("start", "resume"):
            history.rows = [old for old in history.rows if old["images_seen"] <= images]
            if event == "resume":
                history.restarts.append(images)
        elif event is None:
            history.rows.append(row)
    found, flaws = scan(run_dir)
    history.results = [Result(folder, values) for folder, values in found]
    history.flaws += logged.flaws + flaws
    for path in listed(run_dir / "sweeps", f"*/{RECORD}"):
        with noted(history.flaws):
            history.sweeps.append(load_sweep(path))
    with noted(history.flaws):
        history.classes = class_names(run_dir)
    return history


def class_names(run_dir: Path) -> list[str]:
    """Names of the classes by label, as training recorded them in data.json; empty if the data have no names.

    Raises DamagedFileError.
    """
    try:
        classes = read_object(run_dir / "data.json", what="what a run says of its data").get("classes")
    except FileNotFoundError:
        return []
    return [str(name) for name in classes] if isinstance(classes, list) else []


def thin(points: list[Point], most: int = 1000) -> list[Point]:
    """At most about `most` points, each the mean of a bin, so that the page stays small however long the run was."""
    size = -(-len(points) // most)
    if size <= 1:
        return points
    chunks = (points[i : i + size] for i in range(0, len(points), size))
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]
