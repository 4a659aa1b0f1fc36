"""Goodput: the share of the time that a run held its processes for which it has something to show."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

_BEGINNINGS = ("start", "resume")


class Goodput:
    """Counts over all starts of a run, from the lines that the earlier ones left in metrics.jsonl.

    Useful are the seconds of steps whose result the run still has, without waiting for data and saves. Held is all time from
    the beginning of each start to its last line of metrics, with set-up and compilation; waiting in a queue is neither.
    """

    def __init__(self, earlier: Sequence[Mapping[str, Any]], began: float) -> None:
        """`earlier`: lines of metrics.jsonl, or the last of them; `began`: Unix time at which this start began."""
        self._rows = [row for row in earlier if isinstance(row.get("images_seen"), int)]
        self._began = began
        self._held_s = self._useful_s = 0.0
        self._lost = 0

    def begin(self, images_seen: int) -> None:
        """Go on at `images_seen`; what was trained past it is lost."""
        at: int | None = None  # where the start that the lines are of has got to
        for row in [*self._rows, {"event": "resume", "images_seen": images_seen}]:
            if row.get("event") in _BEGINNINGS:
                self._lost += max((at or 0) - row["images_seen"], 0)
                at = row["images_seen"]
            elif "event" not in row:
                at = row["images_seen"]
                self._held_s = row.get("goodput/held_s") or self._held_s
                self._lost = row.get("goodput/images_lost") or self._lost
                if at <= images_seen:
                    self._useful_s = row.get("goodput/useful_s") or self._useful_s
        self._rows = []

    def after(self, row: Mapping[str, float]) -> dict[str, float]:
        """The metrics after one more window of steps, whose own metrics are `row`."""
        self._useful_s += row.get("time/useful_s", 0.0)
        held_s = self._held_s + max(time.time() - self._began, 0.0)
        return {
            "goodput/share": min(self._useful_s / held_s, 1.0) if held_s > 0 else 0.0,
            "goodput/useful_s": self._useful_s, "goodput/held_s": held_s, "goodput/images_lost": self._lost,
        }  # fmt: skip
