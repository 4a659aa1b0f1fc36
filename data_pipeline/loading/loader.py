"""Batches for training: the order's samples, decoded ahead of time, this rank's share of each batch."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.transform import flips
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.batch import Batch
from tarflow.data_pipeline.loading.choose_reader import check_form, choose_reader
from tarflow.data_pipeline.loading.order import Order
from tarflow.data_pipeline.loading.prefetch import Prefetched
from tarflow.data_pipeline.loading.sample_reader import Skipped, check_labels
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tarflow.data_pipeline.loading.stream import StreamSource, stream_fingerprint, stream_shards
from tarflow.data_pipeline.loading.worker import Layout, Producer, Spec
from tarflow.data_pipeline.loading.worker_pool import WorkerPool
from tarflow.data_pipeline.storage.changed_shards import check_shards
from tarflow.data_pipeline.storage.fetch_ahead import FetchAhead
from tarflow.data_pipeline.storage.open_index import open_index
from tarflow.data_pipeline.storage.remote_shards import unchecked
from tarflow.data_pipeline.storage.shard_cache import ShardCache

log = logging.getLogger("tarflow.data")

_SHARE_FLOOR = 1000  # the bad share is counted against at least this many images, so one early bad image does not stop
_NAMED = 20
_STREAM_BUFFER = 1000  # samples of a stream that are mixed; they are held as files, not as pixels


class Loader:
    """Endless batches of the data set `data.train`, starting at stream position `place.images_seen`.

    The stream is defined in `order`: it depends on the data, `place.seed`, `data.num_canonical_nodes` and
    `data.shuffle_block` alone; the rank and the world size choose a share of each global batch, and `data.num_workers`
    changes nothing but the speed: 0 decodes in a background thread, more in processes of their own, up to
    `data.prefetch_batches` ahead. A stream without an index promises less, see `stream`, and is read by a thread.

    `data.flip`: mirror half of the samples, keyed by seed and position. `data.on_error`: `strict` raises at the first
    bad sample, `skip` replaces it by the next good sample of its shard (see `SkippingReader`), counts it in `counters`,
    and stops when more than `data.max_bad_share` of the images (of at least 1,000) had to be replaced. Raises DataError.

    The state of a loader is `place.images_seen` (kept by the trainer) and `fingerprint`. Each `iter()` starts at
    `place.images_seen` again and ends the one before. Call `close()` when done, or use it as a context manager.
    """

    def __init__(self, data: DataSettings, shape: ImageShape, place: BatchShard, *, pin_memory: bool = False) -> None:
        self.data, self.place = data, place
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.counters: Counter[str] = Counter()
        self.spec = Spec(
            data=data.train, fingerprint="", shape=shape, on_error=data.on_error, seed=place.seed, flip=data.flip,
            access=data.access, max_pixels=data.max_image_pixels,
        )  # fmt: skip
        self.layout = Layout(place.share, shape.image_size, shape.channels)
        self._delivered = 0
        self._stop: Callable[[], None] = lambda: None
        self._pids: Callable[[], list[int]] = list
        self._ahead: FetchAhead | None = None
        self.reader = choose_reader(data)
        if self.reader == "stream":
            self.shards = stream_shards(data.train)
            if place.rank == 0:
                log.warning("%d shards as streams, without an index: the order depends on the number of ranks, and a resume "
                            "goes to the nearest shard; first %s", len(self.shards), self.shards[0])  # fmt: skip
            return
        self.index = open_index(data.train, data.access)
        self.reader = check_form(self.index, data.reader)
        self.spec = replace(self.spec, fingerprint=self.index.fingerprint)
        self.order = Order(
            self.index.shard_sizes, seed=place.seed, num_canonical_nodes=data.num_canonical_nodes,
            shuffle_block=data.shuffle_block,
        )  # fmt: skip
        check_labels(self.index, shape.num_classes, data.on_error)
        if self.index.any_remote and data.cache_bytes:
            ShardCache(data.access.folder(), data.cache_bytes).sweep()
        if place.rank == 0:  # the others would only ask the file system the same
            check_shards(self.index)
            _log_data(self.index)
            if why := unchecked(self.index, data.access):
                log.warning("%s", why)

    @property
    def fingerprint(self) -> str:
        """The data set's fingerprint; a run that goes on with other data no longer follows the same order.

        For a stream nothing but the names of the shards is known, so it is made of those.
        """
        if self.reader == "stream":
            return stream_fingerprint(self.shards)
        return self.index.fingerprint

    @property
    def num_samples(self) -> int:
        """Samples in the data set: the length of an epoch. Raises DataError for a stream."""
        if self.reader == "stream":
            raise DataError("the number of samples in a stream is not known: data with an index have one")
        return self.order.num_samples

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._delivered = 0
        if self.reader == "stream":
            return self._delivering(self._from_stream())
        if self.index.any_remote and self.data.cache_bytes:
            place = self.place
            self._ahead = FetchAhead(
                self.index, self.data.access, place.global_batch_size, place.images_seen, self._share_of_order()
            )
        return self._with_processes() if self.data.num_workers else self._delivering(self._from_samples())

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def worker_pids(self) -> list[int]:
        """Process ids of the workers of the iteration under way; empty without workers."""
        return list(self._pids())

    def close(self) -> None:
        """End the workers or the thread. Batches that were handed out stay valid."""
        self._stop()
        self._stop, self._pids = lambda: None, list
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _plan(self) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """(images_seen, slots, stream positions, ids) of each batch, int64 [b]."""
        place, seen = self.place, self.place.images_seen
        while True:
            slots = self.order.slots(seen, place.global_batch_size, place.rank, place.world_size)
            positions = seen + slots
            yield seen, slots, positions, self.order.ids(positions)
            seen += place.global_batch_size

    def _share_of_order(self) -> Callable[[int, int], NDArray[np.int64]]:
        """A function (position, batches) -> ids of this rank's samples there.

        It has an order of its own, since two threads must not share the caches of one.
        """
        order, place, size = self.order.copy(), self.place, self.place.global_batch_size

        def ids(position: int, batches: int) -> NDArray[np.int64]:
            starts = range(position, position + batches * size, size)
            return order.ids(
                np.concatenate([seen + order.slots(seen, size, place.rank, place.world_size) for seen in starts])
            )

        return ids

    def _delivering(self, produced: Iterator[tuple[Batch, list[Skipped]]]) -> Iterator[Batch]:
        """Batches made in a background thread."""
        batches = Prefetched(produced, self.data.prefetch_batches)
        self._stop = batches.close
        for batch, skipped in batches:
            self._account(skipped)
            yield batch

    def _empty(self) -> tuple[torch.Tensor, NDArray[np.int64], NDArray[np.int64]]:
        """(images uint8 [b, H, W, C], labels int64 [b], ids int64 [b]) to be filled."""
        rows = self.layout.rows
        images = torch.empty((rows, *self.spec.shape.pixels), dtype=torch.uint8, pin_memory=self.pin_memory)
        return images, np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.int64)

    def _from_samples(self) -> Iterator[tuple[Batch, list[Skipped]]]:
        producer = Producer(self.spec)
        for seen, slots, positions, ids in self._plan():
            images, labels, delivered = self._empty()
            skipped = producer.fill(ids, positions, images.numpy(), labels, delivered)
            yield Batch.of(images, labels, delivered, slots, seen), skipped

    def _from_stream(self) -> Iterator[tuple[Batch, list[Skipped]]]:
        data, place, share = self.data, self.place, self.place.share
        source = StreamSource(
            self.shards, self.spec.shape, place, strict=data.on_error == "strict",
            buffer=min(data.shuffle_block, _STREAM_BUFFER), counts_folder=data.access.folder(),
            max_pixels=data.max_image_pixels,
        )  # fmt: skip
        slots = np.arange(place.rank * share, (place.rank + 1) * share, dtype=np.int64)
        seen = place.images_seen
        while True:
            images, labels, ids = self._empty()
            mirrored = flips(place.seed, seen + slots) if data.flip else np.zeros(share, dtype=bool)
            for row, image in enumerate(images.numpy()):
                labels[row], ids[row] = source.read_into(image)
                if mirrored[row]:
                    image[...] = image[:, ::-1].copy()
            skipped, source.skipped = source.skipped, []
            yield Batch.of(images, labels, ids, slots, seen), skipped
            seen += place.global_batch_size

    def _with_processes(self) -> Iterator[Batch]:
        pool = WorkerPool(self.spec, self.layout, self.data.num_workers, self.data.prefetch_batches)
        self._stop, self._pids = pool.close, pool.pids
        register = _PinnedMemory(pool) if self.pin_memory else None
        plan = self._plan()
        ahead: deque[tuple[int, int, NDArray[np.int64]]] = deque()
        while True:
            while pool.can_submit():
                seen, slots, positions, ids = next(plan)
                ahead.append((pool.submit(ids, positions), seen, slots))
            slot, seen, slots = ahead.popleft()
            try:
                skipped = pool.wait(slot)
            except BaseException:
                pool.close()
                raise
            labels, delivered = pool.labels_and_ids(slot)
            images = torch.from_numpy(pool.take(slot, register.copied if register else _nothing_to_wait_for))
            self._account(skipped)
            yield Batch.of(images, labels, delivered, slots, seen)
            del images  # or the slot would be held until the next batch is there

    def _account(self, skipped: list[Skipped]) -> None:
        """Count replaced samples of a batch that is handed out; stop the run above the allowed share."""
        self._delivered += self.layout.rows
        if self._ahead is not None:
            self._ahead.reached(self.place.images_seen + self._delivered * self.place.world_size)
        for bad in skipped:
            self.counters[bad.cause] += 1
            if self.counters.total() <= _NAMED:
                log.warning("replaced a bad sample (%s): %s", bad.cause, bad.message)
            if self.counters.total() == _NAMED:
                log.warning("further bad samples are only counted")
        bad_count = self.counters.total()
        if skipped and bad_count > self.data.max_bad_share * max(self._delivered, _SHARE_FLOOR):
            causes = ", ".join(f"{cause} {count}" for cause, count in sorted(self.counters.items()))
            self.close()
            raise DataError(
                f"{bad_count} of {self._delivered} images had to be replaced ({causes}), more than "
                f"data.max_bad_share={self.data.max_bad_share} allows; last: {skipped[-1].message}"
            )


class _PinnedMemory:
    """Makes the pool's shared memory page-locked, so that copies to the GPU run beside the computation."""

    def __init__(self, pool: WorkerPool) -> None:
        code = torch.cuda.cudart().cudaHostRegister(pool.address(), pool.memory_bytes, 0)
        if int(code) != 0:
            log.warning("could not pin the shared memory of the data workers (CUDA error %s): copies will block", code)

    def copied(self) -> Callable[[], None]:
        """Called when a batch is dropped: its copy to the GPU may still be under way, so wait for it before reuse."""
        event = torch.cuda.Event()
        event.record()
        return event.synchronize


def _nothing_to_wait_for() -> None:
    return None


def _log_data(index: Index) -> None:
    named = f", {index.num_classes} classes" if index.num_classes else ""
    log.info(
        "%s: %d shards, %d samples%s, fingerprint %s",
        index.root, len(index.shard_sizes), index.num_samples, named, index.fingerprint,
    )  # fmt: skip
    if not index.knows_content:
        log.warning(
            "the index at %s is of an earlier version, whose fingerprint does not see what the shards hold: "
            "`tarflow data index %s` writes one that does; runs go on with it",
            index.root, index.root,
        )  # fmt: skip
    empty = [index.shard_paths[i] for i in np.flatnonzero(index.shard_sizes == 0)]
    if empty:
        log.warning("%d shards are empty: %s", len(empty), ", ".join(empty[:10]) + " ..." * (len(empty) > 10))
