"""Fetches remote shards before their samples are needed, so that a slow one does not stall the batches.

A thread follows the order ahead of the consumer and puts the shards of this rank's share into the node's cache, up to half
of its size. It only warms the cache: what it cannot fetch, the reader tries again and reports.
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

_PLACES = 32  # positions of the order looked up at once, or one batch if that is more


class FetchAhead:
    """Fetches from stream position `start` on. `ids(position, batches)`: this rank's samples in that many batches from there.

    Call `reached(position)` as the consumer advances, and `close()` at the end, which aborts a fetch in progress.
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
        """The consumer is at this position: what was fetched for earlier ones no longer counts against the limit."""
        with self._moved:
            self._reached = position
            self._moved.notify()

    def close(self) -> None:
        """Stop; waits briefly for a fetch to notice."""
        with self._moved:
            self._stopped = True
            self._moved.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def _run(self, position: int) -> None:
        last_use: dict[int, int] = {}  # shard -> last position known to need it
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
            with self._moved:  # an epoch ahead, no shard is new
                while position > self._reached + self.index.num_samples and not self._stopped:
                    self._moved.wait()
                if self._stopped:
                    return

    def _room(self, last_use: dict[int, int], size: int) -> bool:
        """Wait until there is room for a shard; False if closed meanwhile."""
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
        # The reader reports an outage or a full disk, where it matters and with the policy for it.
        try:
            self._shards.fetch(shard)
        except (DataError, OSError):
            with self._moved:
                if not self._stopped:
                    self._moved.wait()  # pointless to continue before the consumer does
