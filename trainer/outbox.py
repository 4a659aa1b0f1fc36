"""Writes that nobody waits for: a shared file system that does not answer stalls a thread, and not the training."""

import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

PATIENCE_S = 0.2  # for one write; a file system at its best takes less than a thousandth of it
CLOSING_S = 10.0  # for what is left at the end

Action = Callable[[], object]


class Outbox:
    """Does what it is given in a thread, one after the other.

    Whoever gives it something waits until it is done, as if there were no thread, but never for longer than `PATIENCE_S`;
    and not at all until whatever takes longer has ended.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._waiting: queue.SimpleQueue[tuple[Action, threading.Event] | None] = queue.SimpleQueue()
        self._stalled = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, action: Action) -> None:
        """Have something done. An error that it raises is raised here, or by the next call."""
        if self._thread is None:  # closed: whatever comes now has nobody else
            action()
            return
        done = threading.Event()
        self._waiting.put((action, done))
        if not self._stalled.is_set() and not done.wait(self._patience_s):
            self._stalled.set()
            if done.is_set():  # at this moment
                self._stalled.clear()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self, patience_s: float = CLOSING_S) -> bool:
        """Wait until all is done, for a while; whether it is."""
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        self._waiting.put(None)
        thread.join(patience_s)
        return not thread.is_alive()

    def _run(self) -> None:
        while (entry := self._waiting.get()) is not None:
            action, done = entry
            try:
                action()
            except BaseException as error:  # noqa: BLE001 - raised where it was given
                self._error = error
            done.set()
            if self._waiting.empty():
                self._stalled.clear()


def within(seconds: float, action: Action) -> bool:
    """Do something in a thread; whether it ended in time, well or not. For last words: the process ends whatever they do."""

    def run() -> None:
        with suppress(OSError):
            action()

    thread = threading.Thread(target=run, name="last words", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        print("what was to be written last is lost: a file system does not answer", file=sys.stderr, flush=True)
    return not thread.is_alive()
