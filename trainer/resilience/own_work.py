"""How long a rank works by itself in a step: what tells a slow rank from those that wait for it.

All ranks take equally long for a step, since each waits for the slowest. A rank's own are the time before the step (data,
hooks) and the forward passes of the flow blocks, in which no collective waits: the parameters have been gathered before them.
On a GPU they are timed by events on the device, because the thread that launches them is done long before and sees nothing of
a device that is throttled; on the CPU by the wall clock, because a thread whose core is taken away uses no CPU time. (ZeRO-3
gathers parameters inside of the blocks: there all ranks look alike.)
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn


class Mark(Protocol):
    """A moment on a device."""

    def query(self) -> bool:
        """Whether the device has got there."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from here to another moment."""
        ...


class WallMark:
    """A moment on a device that is as far as its host."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        """It has."""
        return True

    def elapsed_time(self, end: "WallMark") -> float:
        """Milliseconds until then."""
        return 1e3 * (end.at - self.at)


def cuda_mark() -> Mark:
    """The moment at which the current stream gets to here."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class OwnWork:
    """Times a rank's own work, step by step. Nothing here waits for the device: times come when it is done."""

    def __init__(
        self, blocks: Iterable[nn.Module], device: torch.device, mark: Callable[[], Mark] | None = None
    ) -> None:
        self._mark: Callable[[], Mark] = mark or (cuda_mark if device.type == "cuda" else WallMark)
        self._running: list[tuple[Mark, Mark]] = []
        self._steps: deque[tuple[float, list[tuple[Mark, Mark]]]] = deque(maxlen=64)
        self._begun: Mark | None = None
        for block in blocks:
            # Innermost: what gathers and frees the parameters has put its hooks there before.
            block.register_forward_pre_hook(self._begin)
            block.register_forward_hook(self._end, prepend=True)

    def _begin(self, *_: Any) -> None:
        self._begun = self._mark()

    def _end(self, *_: Any) -> None:
        if self._begun is not None:
            self._running.append((self._begun, self._mark()))
            self._begun = None

    def step_done(self, before_s: float) -> list[float]:
        """End a step that this rank has spent `before_s` seconds on before it; own seconds of the steps known by now."""
        self._steps.append((before_s, self._running))
        self._running = []
        found = []
        while self._steps and all(end.query() for _, end in self._steps[0][1][-1:]):
            before_s, pairs = self._steps.popleft()
            found.append(before_s + sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3)
        return found
