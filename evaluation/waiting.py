"""Keeps retention away from checkpoints that wait to be evaluated, while others are."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from tarflow.errors import UserError
from tarflow.evaluation.log import Log
from tarflow.trainer.checkpoint.marker import MARKER, Checkpoint
from tarflow.trainer.checkpoint.pins import Pins


class WaitingCheckpoints:
    """Pins of the first `most` checkpoints that wait, looked up again and again by a thread.

    `present`: the checkpoints in the order of their evaluation; `waits`: whether one has no result yet. Both are called in
    that thread.
    """

    def __init__(
        self, present: Callable[[], Sequence[Checkpoint]], waits: Callable[[Checkpoint], bool], most: int, log: Log
    ) -> None:
        self.present, self.waits, self.most, self.log = present, waits, most, log
        self._pins = Pins(f"waiting-{os.uname().nodename}-{os.getpid()}")
        self._seen: dict[str, Checkpoint] = {}
        self._many = False

    def look(self) -> None:
        """Pin what waits now, and say what was removed before its turn."""
        now = [checkpoint for checkpoint in self.present() if self.waits(checkpoint)]
        self._pins.hold(now[: self.most])
        for name in self._seen.keys() - {checkpoint.name for checkpoint in now}:
            gone = self._seen.pop(name)
            if not (gone.path / MARKER).exists() and self.waits(gone):
                self.log(
                    f"WARNING: {name} was removed by the run's retention before it was evaluated ({self._limit()})"
                )
        self._seen |= {checkpoint.name: checkpoint for checkpoint in now}
        if len(now) > self.most and not self._many:
            self.log(
                f"{len(now)} checkpoints wait to be evaluated, and retention leaves the first {self.most} of them alone "
                f"({self._limit()})"
            )
        self._many = len(now) > self.most

    def _limit(self) -> str:
        return f"evaluation.keep_waiting={self.most}"

    @contextmanager
    def kept(self, every_s: float) -> Iterator[None]:
        """Look every few seconds during the block."""
        over = threading.Event()

        def again() -> None:
            while not over.wait(every_s):
                with suppress(UserError, OSError):  # the evaluation meets it as well, and reports it
                    self.look()

        self.look()
        thread = threading.Thread(target=again, name="waiting checkpoints", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with suppress(UserError, OSError):
                self.look()
            self._pins.hold([])
