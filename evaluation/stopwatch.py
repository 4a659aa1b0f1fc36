"""Seconds by phase, of one worker or of all of them together."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Wall-clock seconds, added up by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside the block."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add({name: time.monotonic() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what another one measured."""
        for name, value in seconds.items():
            self.seconds[name] = round(self.seconds.get(name, 0.0) + value, 3)
