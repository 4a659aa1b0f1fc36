"""Remote shards are fetched before their samples are wanted, so that a slow one is met while batches still wait.

A thread goes through the order ahead of the consumer and puts the shards of this rank's share into the node's cache, as far
as half of the cache reaches. It only warms the cache: what it cannot fetch, the reader will try again and report.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.storage.access import Access
from tarflow.data_pipeline.storage.remote_shards import RemoteShards

_PLACES = 32  # positions of the order looked up at once, or one batch


class FetchAhead:
    """Fetches from stream position `start` on. `ids(position, batches)`: this rank's samples in so many batches from there.

    Call `reached(position)` as the consumer goes on, and `close()` in the end: a fetch under way is given up.
    """

    def __init__(
        self, index: Index, access: Access, batch: int, start: int, ids: Callable[[int, int], NDArray[np.int64]]
    ) -> None:
        self.index = index
        self.batch = batch
        self._ids = ids
        self._limit = access.cache_bytes // 2
        self._reached = start
        self._moved = threading.Condition()
        self._stopped = False
        self._shards = RemoteShards(index, access)
        self._shards.remote.stopped = lambda: self._stopped
        self._thread = threading.Thread(target=self._run, args=(start,), name="tarflow-fetch", daemon=True)
        self._thread.start()

    def reached(self, position: int) -> None:
        """The consumer is at this position: what was fetched for places before it no longer counts."""
        with self._moved:
            self._reached = position
            self._moved.notify()

    def close(self) -> None:
        """Stop; waits a moment for a fetch to notice."""
        with self._moved:
            self._stopped = True
            self._moved.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def _run(self, position: int) -> None:
        last_use: dict[int, int] = {}  # shard -> last position that was seen to want it
        while True:
            batches = max(1, _PLACES // self.batch)
            end = position + batches * self.batch
            shards = np.unique(self.index.shard_starts.searchsorted(self._ids(position, batches), side="right") - 1)
            for shard in shards.tolist():
                if shard not in last_use and self.index.is_remote(shard):
                    if not self._room(last_use, int(self.index.shard_bytes[shard])):
                        return
                    self._fetch(shard)
                last_use[shard] = end
            position = end
            with self._moved:  # an epoch ahead, there is nothing new to find
                while position > self._reached + self.index.num_samples and not self._stopped:
                    self._moved.wait()
                if self._stopped:
                    return

    def _room(self, last_use: dict[int, int], size: int) -> bool:
        """Wait until there is room for a shard; False when it is time to stop."""
        with self._moved:
            while True:
                if self._stopped:
                    return False
                for shard in [shard for shard, end in last_use.items() if end <= self._reached]:
                    del last_use[shard]
                held = sum(int(self.index.shard_bytes[shard]) for shard in last_use)
                if held + size <= self._limit or not last_use:
                    return True
                self._moved.wait()

    def _fetch(self, shard: int) -> None:
        # An outage or a full disk is the reader's to report, in the right place and with the right policy.
        try:
            self._shards.fetch(shard)
        except (DataError, OSError):
            with self._moved:
                if not self._stopped:
                    self._moved.wait()  # no use to go on before the consumer does
