"""The loader: endless batches for training, from a position that can be saved and restored."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.batch import Batch
from tarflow.data_pipeline.loading.choose_reader import choose_reader
from tarflow.data_pipeline.loading.custom.source import CustomSource
from tarflow.data_pipeline.loading.indexed import IndexedSource
from tarflow.data_pipeline.loading.sample_reader import Skipped
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tarflow.data_pipeline.loading.source import BatchSource, Delivery, Position, from_state, to_state
from tarflow.data_pipeline.loading.stream.source import StreamSource

log = logging.getLogger("tarflow.data")

_SOURCES: dict[str, Callable[[DataSettings, ImageShape, BatchShard, bool], BatchSource]] = {
    "indexed": IndexedSource, "stream": StreamSource, "custom": CustomSource,
}  # fmt: skip
_SHARE_FLOOR = (
    1000  # the bad share is taken of at least this many images, so that one early bad image does not stop a run
)
_NAMED = 20  # bad samples that are logged one by one


class Loader:
    """Endless batches of the data set `settings.train`, starting after `images_seen` images of the stream of samples.

    The stream is defined in `order`: it depends on the data, `shard.seed`, `data.num_canonical_nodes` and
    `data.shuffle_block` alone; the rank and the world size choose a share of each global batch. Tars without an index
    guarantee less, see `stream`.

    `data.dataset` gives the samples in the place of shards, `data.transform` changes each image. `data.flip`: mirror half of
    the samples, keyed by seed and position. `data.on_error`: `strict` raises at the first bad sample, `skip` replaces it by
    the next good sample of its shard (see `SkippingReader`), counts it in `counters`, and stops when more than
    `data.max_bad_share` of the images (of at least 1,000) had to be replaced. Raises DataError.

    Each `iter()` starts at the same position again, the one that was given or loaded last, and ends the one before.
    `state_dict()` is the position behind the last batch that was taken. Call `close()` when done, or use the loader as a
    context manager.
    """

    def __init__(
        self, settings: DataSettings, shape: ImageShape, shard: BatchShard, *, images_seen: int = 0,
        pin_memory: bool = False,
    ) -> None:  # fmt: skip
        self.settings, self.shard = settings, shard
        self.counters: Counter[str] = Counter()
        self._start = self._position = Position(images_seen)
        self._delivered = 0  # images of this rank in the current iteration
        source = _SOURCES[choose_reader(settings)]
        self.source: BatchSource = source(settings, shape, shard, pin_memory and torch.cuda.is_available())

    @property
    def reader(self) -> str:
        """The reader that was chosen: `indexed`, `mds`, `stream` or `custom`."""
        return self.source.reader

    @property
    def fingerprint(self) -> str:
        """The data set's fingerprint; a run that resumes with other data no longer follows the same order.

        For a stream it covers the names of the shards, and of those in the file system their sizes and some blocks.
        """
        return self.source.fingerprint

    @property
    def num_samples(self) -> int:
        """Samples in the data set: the length of an epoch. Raises DataError for a stream."""
        return self.source.num_samples

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._position, self._delivered = self._start, 0
        # A map holds no reference to the batch it handed out, whose shared memory can so be used again.
        return map(self._hand_out, self.source.batches(self._start))

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch that was taken, whatever was decoded ahead: plain numbers and texts.

        With an index it is the same on all ranks, and valid for any batch size and number of ranks. For a stream it also
        holds where this rank is, so each rank saves its own; with another number of ranks a stream resumes at the nearest
        shard.
        """
        return to_state(self.source, self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next `iter()` start where `state_dict` was called; ends the current one.

        Raises DataError where the state is damaged, or of other data, another seed or another order.
        """
        position = from_state(self.source, state)
        self.close()
        self._start = self._position = position

    def worker_pids(self) -> list[int]:
        """Process ids of the workers of the current iteration; empty without workers."""
        return self.source.worker_pids()

    def close(self) -> None:
        """Stop the workers or the thread. Batches that were handed out stay valid."""
        self.source.close()

    def _hand_out(self, delivery: Delivery) -> Batch:
        self._delivered += self.shard.size
        self._count(delivery.replaced)
        self._position = delivery.after
        return delivery.batch

    def _count(self, replaced: list[Skipped]) -> None:
        """Count replaced samples; stop the run above the allowed share."""
        for bad in replaced:
            self.counters[bad.cause] += 1
            if self.counters.total() <= _NAMED:
                log.warning("replaced a bad sample (%s): %s", bad.cause, bad.message)
            if self.counters.total() == _NAMED:
                log.warning("further bad samples are only counted")
        bad_count = self.counters.total()
        if replaced and bad_count > self.settings.max_bad_share * max(self._delivered, _SHARE_FLOOR):
            causes = ", ".join(f"{cause} {count}" for cause, count in sorted(self.counters.items()))
            self.close()
            raise DataError(
                f"{bad_count} of {self._delivered} images had to be replaced ({causes}), more than "
                f"data.max_bad_share={self.settings.max_bad_share} allows; last: {replaced[-1].message}"
            )
