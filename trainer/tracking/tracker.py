"""The interface of whatever keeps a run's metrics, and several of them as one that never fails."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tarflow.errors import in_words
from tarflow.trainer.outbox import CLOSING_S, Outbox

Values = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Point:
    """Metrics of a run at one number of images seen, and PNG files by name. A value of None is unknown."""

    step: int
    images_seen: int
    values: Values
    pictures: Mapping[str, Path] = field(default_factory=dict)
    time: float = field(default_factory=time.time)  # Unix time at which they were measured


class Tracker:
    """Keeps the metrics of a run; override what is needed. Any method may raise, and any may take its time."""

    name: str  # in messages
    switch: str  # the setting that turns it off
    closing_s: float = CLOSING_S  # how long the end of a run waits for what it has not taken yet

    def begin(self, images_seen: int, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """A start of the run begins here: what earlier starts left past `images_seen` is about to be repeated.

        `settings`: the configuration, by section and name.
        """

    def event(self, values: Mapping[str, Any]) -> None:
        """Something that happened: a start, a save."""

    def log(self, point: Point) -> None:
        """Keep the metrics of one point."""

    def close(self) -> None:
        """Write what is left."""

    def abandon(self) -> None:
        """Called if `close` takes longer than `closing_s`: leave nothing behind that the end of the process waits for."""


class Trackers:
    """Several trackers, each in a thread of its own: none of them can fail, stall or outlast the training."""

    def __init__(self, trackers: Sequence[Tracker], say: Callable[[str], object]) -> None:
        """`say`: logs a warning."""
        self._trackers = [(tracker, Outbox()) for tracker in trackers]
        self._say, self._said = say, set[str]()

    def begin(self, images_seen: int, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """See `Tracker.begin`."""
        self._each(lambda tracker: tracker.begin(images_seen, settings))

    def event(self, values: Mapping[str, Any]) -> None:
        """See `Tracker.event`."""
        self._each(lambda tracker: tracker.event(values))

    def log(self, point: Point) -> None:
        """See `Tracker.log`."""
        self._each(lambda tracker: tracker.log(point))

    def close(self) -> None:
        """Close them all; what one has not taken after its `closing_s` is lost, and named."""
        self._each(lambda tracker: tracker.close())
        for tracker, outbox in self._trackers:
            if not outbox.close(tracker.closing_s):
                self._said.add(tracker.name)  # whatever it says now is the consequence
                tracker.abandon()
                self._say(f"WARNING: {tracker.name} has not taken the last metrics within {tracker.closing_s:g} s")

    def _each(self, action: Callable[[Tracker], object]) -> None:
        for tracker, outbox in self._trackers:
            outbox.put(lambda tracker=tracker: self._guarded(tracker, action))  # type: ignore[misc]

    def _guarded(self, tracker: Tracker, action: Callable[[Tracker], object]) -> None:
        try:
            action(tracker)
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the training goes on
            if tracker.name not in self._said:  # once: it may fail at every point
                self._said.add(tracker.name)
                self._say(
                    f"WARNING: {tracker.name} failed, the run goes on without it: {in_words(error)} ({tracker.switch})"
                )
