"""An iterator that works ahead in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from tarflow.devices import keep_device

T = TypeVar("T")


@dataclass
class _End:
    """Stands in the queue behind the last item. `error`: what ended the iterator early."""

    error: BaseException | None = None


class Prefetched(Generic[T]):
    """Runs an iterator in a background thread, at most `depth` items ahead. Its errors are raised where items are taken."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=keep_device(self._run), name="tarflow-data", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._put(_End())
        except BaseException as err:  # noqa: BLE001 - it is raised again where the items are taken
            self._put(_End(err))

    def _put(self, item: T | _End) -> bool:
        """False if nobody takes items any more."""
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        try:
            while not self._stopped.is_set():
                try:
                    item = self._queue.get(timeout=0.5)
                except queue.Empty:
                    continue
                if isinstance(item, _End):
                    if item.error is not None:
                        raise item.error
                    return
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """Stop the thread after the item it is at."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)
