"""An iterator that works ahead in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any


class Prefetched:
    """Runs an iterator in a background thread, at most `depth` items ahead. Its errors are raised where they belong."""

    def __init__(self, items: Iterator[Any], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tarflow-data", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put("item", item):
                    return
            self._put("end", None)
        except BaseException as err:  # noqa: BLE001 - it is raised again where the batches are taken
            self._put("error", err)

    def _put(self, kind: str, value: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Any]:
        try:
            while not self._stopped.is_set():
                try:
                    kind, value = self._queue.get(timeout=0.5)
                except queue.Empty:
                    continue
                if kind == "error":
                    raise value
                if kind == "end":
                    return
                yield value
        finally:
            self.close()

    def close(self) -> None:
        """Stop the thread after the item it is at."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
