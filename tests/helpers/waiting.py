"""Waiting for something to become true: tests wait on conditions, and never guess how long a machine takes."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 150.0  # far above what a crowded machine needs: it is spent only where a test is about to fail


def until(what: str, look: Callable[[], T], patience_s: float = PATIENCE_S, every_s: float = 0.02) -> T:
    """Look until the answer is true, and return it."""
    end = time.monotonic() + patience_s
    while not (found := look()):
        assert time.monotonic() < end, f"{what}: not within {patience_s:g} s (now: {found!r})"
        time.sleep(every_s)
    return found
