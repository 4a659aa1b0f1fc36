"""A save that was asked for, running or ended."""

import threading
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Position:
    """Where a run is: images seen, optimizer steps taken until then, and those tried (skipped ones too)."""

    images_seen: int = 0
    step: int = 0
    tried: int = 0


@dataclass
class SaveHandle:
    """One save. While its thread runs only `position`, `done` and `wait` may be used."""

    position: Position
    snapshot: bool = False  # the averages are also kept for good, as a snapshot
    began: float = field(default_factory=time.monotonic)
    blocked_s: float = 0.0  # training was blocked for
    seconds: float = 0.0  # until committed
    error: str | None = None  # the same on every rank
    name: str = ""  # of the committed checkpoint
    removed: list[str] = field(default_factory=list)  # checkpoints, by retention
    warnings: list[str] = field(default_factory=list)  # what went wrong after the commit
    thread: threading.Thread | None = field(default=None, repr=False)  # None: written before `save` returned

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self.thread is None or not self.thread.is_alive()

    def wait(self) -> None:
        """Block until it has ended."""
        if self.thread is not None:
            self.thread.join()
