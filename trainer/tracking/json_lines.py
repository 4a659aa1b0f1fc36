"""metrics.jsonl: every point and event of a run as a sealed line of JSON. Always written; all else can be had from it."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tarflow.files import LineWriter
from tarflow.records import read_lines, sealed
from tarflow.trainer.tracking.tracker import Point, Tracker

FILE = "metrics.jsonl"
_TAIL = 1 << 20  # bytes of earlier starts that are read


class JsonLines(Tracker):
    """Appends to metrics.jsonl. What is not finite, as in a window of skipped steps, is null."""

    name, switch = FILE, "always written"

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / FILE
        self.earlier = read_lines(path, tail=_TAIL).rows  # unreadable lines count as none
        self.emptied = os.path.lexists(path) and not self.earlier
        self._file = LineWriter(path)

    def event(self, values: Mapping[str, Any]) -> None:
        """Write an event with its time."""
        self._write({"event": values["event"], "time": time.time(), **values})

    def log(self, point: Point) -> None:
        """Write a line of metrics."""
        self._write({"step": point.step, "images_seen": point.images_seen, "time": point.time, **point.values})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(sealed(finite)))
