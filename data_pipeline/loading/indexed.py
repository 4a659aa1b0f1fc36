"""Batches of a data set with an index, in the file system or behind an address, in the exact order of `order`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.batch import Batch
from tarflow.data_pipeline.loading.choose_reader import check_form, rule_of
from tarflow.data_pipeline.loading.custom.code import Named, find_function
from tarflow.data_pipeline.loading.custom.dataset import CustomDataset
from tarflow.data_pipeline.loading.order import Order
from tarflow.data_pipeline.loading.prefetch import Prefetched
from tarflow.data_pipeline.loading.sample_reader import check_labels
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tarflow.data_pipeline.loading.source import Delivery, Position, empty_batch
from tarflow.data_pipeline.loading.worker import Layout, Producer, Spec
from tarflow.data_pipeline.loading.worker_pool import WorkerPool
from tarflow.data_pipeline.storage.changed_shards import check_shards
from tarflow.data_pipeline.storage.fetch_ahead import FetchAhead
from tarflow.data_pipeline.storage.open_index import open_index
from tarflow.data_pipeline.storage.remote_shards import unchecked
from tarflow.data_pipeline.storage.shard_cache import ShardCache

log = logging.getLogger("tarflow.data")


@dataclass(frozen=True)
class _Planned:
    """One batch of this rank before it is read: int64 [b] each, for the slots in the global batch."""

    images_seen: int
    slots: NDArray[np.int64]
    positions: NDArray[np.int64]  # in the stream
    ids: NDArray[np.int64]
    after: Position


class OrderedSource:
    """A `BatchSource` in the exact order of `order`, whatever the samples are read from.

    `data.num_workers` changes nothing but the speed: 0 decodes in a background thread, more in processes of their own, up to
    `data.prefetch_batches` ahead. `custom`: the open data set, where it is a user's own.
    """

    reader: str
    fingerprint: str

    def __init__(
        self, settings: DataSettings, shard: BatchShard, pin_memory: bool, sizes: NDArray[np.int64], spec: Spec,
        custom: CustomDataset | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.shard, self.pin_memory = settings, shard, pin_memory
        self.order = Order(
            sizes, seed=shard.seed, num_canonical_nodes=settings.num_canonical_nodes, shuffle_block=settings.shuffle_block
        )  # fmt: skip
        self.fingerprint, self._spec, self._custom = spec.fingerprint, spec, custom

        # What the current iteration runs.
        self._prefetched: Prefetched[Delivery] | None = None
        self._pool: WorkerPool | None = None
        self._ahead: FetchAhead | None = None

    @property
    def num_samples(self) -> int:
        """See `BatchSource`."""
        return self.order.num_samples

    @property
    def order_settings(self) -> dict[str, int]:
        """See `BatchSource`."""
        order = self.order
        return {
            "seed": order.seed, "num_canonical_nodes": order.num_canonical_nodes, "shuffle_block": order.shuffle_block
        }  # fmt: skip

    def batches(self, position: Position) -> Iterator[Delivery]:
        """See `BatchSource`."""
        self.close()
        self._ahead = self._fetch_ahead(position)
        plan = self._plan(position.images_seen)
        yield from self._from_processes(plan) if self.settings.num_workers else self._from_thread(plan)

    def _fetch_ahead(self, position: Position) -> FetchAhead | None:  # noqa: ARG002 -- for those that fetch
        """What fetches shards ahead of the batches from `position` on; nothing where they need not be fetched."""
        return None

    def worker_pids(self) -> list[int]:
        """See `BatchSource`."""
        return self._pool.pids() if self._pool is not None else []

    def close(self) -> None:
        """See `BatchSource`."""
        for running in (self._prefetched, self._pool, self._ahead):
            if running is not None:
                running.close()
        self._prefetched = self._pool = self._ahead = None

    def _plan(self, images_seen: int) -> Iterator[_Planned]:
        shard = self.shard
        while True:
            slots = self.order.slots(images_seen, shard.global_batch_size, shard.rank, shard.world_size)
            positions = images_seen + slots
            after = Position(images_seen + shard.global_batch_size)
            yield _Planned(images_seen, slots, positions, self.order.ids(positions), after)
            images_seen = after.images_seen

    def _report_progress(self, after: Position) -> None:
        """Tell the thread that fetches ahead how far the consumer is."""
        if self._ahead is not None:
            self._ahead.reached(after.images_seen)

    def _from_thread(self, plan: Iterator[_Planned]) -> Iterator[Delivery]:
        self._prefetched = Prefetched(self._decoded(plan), self.settings.prefetch_batches)
        for delivery in self._prefetched:
            self._report_progress(delivery.after)
            yield delivery

    def _decoded(self, plan: Iterator[_Planned]) -> Iterator[Delivery]:
        producer = Producer(self._spec, self._custom)
        for planned in plan:
            images, labels, ids = empty_batch(self.shard.size, self._spec.shape.pixels, self.pin_memory)
            replaced = producer.fill(planned.ids, planned.positions, images.numpy(), labels, ids)
            yield Delivery(Batch.of(images, labels, ids, planned.slots, planned.images_seen), replaced, planned.after)

    def _from_processes(self, plan: Iterator[_Planned]) -> Iterator[Delivery]:
        shape, settings = self._spec.shape, self.settings
        layout = Layout(self.shard.size, shape.pixels)
        self._pool = pool = WorkerPool(self._spec, layout, settings.num_workers, settings.prefetch_batches)
        pinned = _PinnedMemory(pool) if self.pin_memory else None
        submitted: deque[tuple[int, _Planned]] = deque()
        while self._pool is pool:  # until this iteration is closed
            # Keep the workers busy before waiting for the oldest batch.
            while pool.can_submit():
                planned = next(plan)
                submitted.append((pool.submit(planned.ids, planned.positions), planned))
            slot, planned = submitted.popleft()
            try:
                replaced = pool.wait(slot)
            except BaseException:
                pool.close()
                raise
            labels, ids = pool.labels_and_ids(slot)
            images = torch.from_numpy(pool.take(slot, pinned.copied if pinned else _nothing_to_wait_for))
            self._report_progress(planned.after)
            yield Delivery(Batch.of(images, labels, ids, planned.slots, planned.images_seen), replaced, planned.after)
            del images  # or the slot would be held until the next batch is there


class IndexedSource(OrderedSource):
    """See `BatchSource`. WebDataset tars and MDS shards.

    Raises DataError for data that are not there, changed after indexing, or labelled for another model.
    """

    def __init__(self, settings: DataSettings, shape: ImageShape, shard: BatchShard, pin_memory: bool) -> None:
        self.index = open_index(settings.train, settings.access)
        self.reader = check_form(self.index, settings.reader)
        crop = rule_of(settings, self.index)
        spec = spec_of(settings, shape, shard, self.index.fingerprint, crop=crop)
        super().__init__(settings, shard, pin_memory, self.index.shard_sizes, spec)
        check_labels(self.index, shape.num_classes, settings.on_error)
        self._cached = self.index.any_remote and settings.cache_bytes > 0
        if self._cached:
            ShardCache(settings.access.folder(), settings.cache_bytes).sweep()
        if shard.rank == 0:  # the others would only ask the file system the same
            check_shards(self.index)
            _log_data(self.index)
            if why := unchecked(self.index, settings.access):
                log.warning("%s", why)

    def _fetch_ahead(self, position: Position) -> FetchAhead | None:
        if not self._cached:
            return None
        return FetchAhead(
            self.index, self.settings.access, self.shard.global_batch_size, position.images_seen, self._ids_ahead()
        )

    def _ids_ahead(self) -> Callable[[int, int], NDArray[np.int64]]:
        """A function (images seen, batches) -> ids of this rank's samples in that many batches from there.

        It has an order of its own, since two threads must not share the caches of one.
        """
        order, shard, size = self.order.copy(), self.shard, self.shard.global_batch_size

        def ids(images_seen: int, batches: int) -> NDArray[np.int64]:
            starts = range(images_seen, images_seen + batches * size, size)
            return order.ids(
                np.concatenate([seen + order.slots(seen, size, shard.rank, shard.world_size) for seen in starts])
            )

        return ids


def spec_of(settings: DataSettings, shape: ImageShape, shard: BatchShard, fingerprint: str, **more: Any) -> Spec:
    """What the readers of a source must know. Raises DataError where a transform may not be imported, or cannot."""
    transform = settings.code("transform")
    return Spec(
        data=settings.train, fingerprint=fingerprint, shape=shape, on_error=settings.on_error, seed=shard.seed,
        flip=settings.flip, access=settings.access, max_pixels=settings.max_image_pixels,
        transform=None if transform is None else find_function("data.transform", Named(transform)).named, **more,
    )  # fmt: skip


class _PinnedMemory:
    """Page-locks the pool's shared memory, so that copies to the GPU overlap with computation."""

    def __init__(self, pool: WorkerPool) -> None:
        code = torch.cuda.cudart().cudaHostRegister(pool.address(), pool.memory_bytes, 0)
        if int(code) != 0:
            log.warning("could not pin the shared memory of the data workers (CUDA error %s): copies will block", code)

    def copied(self) -> Callable[[], None]:
        """Called when a batch is dropped: its copy to the GPU may still be running, so wait for it before reuse."""
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
            "the index at %s is of an earlier version, whose fingerprint does not cover what the shards hold: "
            "`tarflow data index %s` writes one that does, and runs resume with it",
            index.root, index.root,
        )  # fmt: skip
    empty = [index.shard_paths[i] for i in np.flatnonzero(index.shard_sizes == 0)]
    if empty:
        log.warning("%d shards are empty: %s", len(empty), ", ".join(empty[:10]) + " ..." * (len(empty) > 10))
