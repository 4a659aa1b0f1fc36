"""Batches for training and validation: the order's samples, decoded ahead of time, this rank's share of each batch."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.images.transform import flips
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.choose_reader import check_form, choose_reader
from tarflow.data_pipeline.loading.order import Order, check_world
from tarflow.data_pipeline.loading.prefetch import Prefetched
from tarflow.data_pipeline.loading.sample_reader import SampleReader, Skipped, check_labels
from tarflow.data_pipeline.loading.stream import StreamSource, stream_fingerprint, stream_shards
from tarflow.data_pipeline.loading.worker import Layout, Producer, Spec
from tarflow.data_pipeline.loading.worker_pool import WorkerPool
from tarflow.data_pipeline.storage.fetch_ahead import FetchAhead
from tarflow.data_pipeline.storage.open_index import open_index
from tarflow.data_pipeline.storage.remote import Access, address
from tarflow.data_pipeline.storage.remote_shards import open_shards
from tarflow.data_pipeline.storage.shard_cache import ShardCache

log = logging.getLogger("tarflow.data")

_SHARE_FLOOR = 1000  # the bad share is counted against at least this many images, so one early bad image does not stop
_NAMED = 20
_STREAM_BUFFER = 1000  # samples of a stream that are mixed; they are held as files, not as pixels


@dataclass
class Batch:
    """This rank's share (b samples) of one global batch.

    `images`: uint8 [b, C, H, W], laid out channels last in memory (a permuted view: use reshape, not view).
    `labels`: int64 [b], -1 = no label. `ids`: int64 [b], index of each sample in the data set, after replacement of
    bad samples. `slots`: int64 [b], index of each sample in the global batch (keys noise and label drop).
    `images_seen`: images seen before this batch, by all ranks together.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    slots: torch.Tensor
    images_seen: int


class Loader:
    """Endless batches of an indexed data set, starting at stream position `images_seen` (any number >= 0).

    The stream is defined in `order`: it depends on the data, `seed`, `num_canonical_nodes` and `shuffle_block` alone;
    `rank` and `world_size` choose a share of each global batch, and `num_workers` changes nothing but the speed:
    0 decodes in a background thread, more in processes of their own, up to `prefetch_batches` ahead.

    `reader`: `indexed`, `mds`, `stream` or `auto`, see `readers`; a stream promises less, see `stream`, and is read by a
    thread. `cache_dir`, `cache_bytes`, `timeout_s`, `retries`: how remote data are reached, see `remote.Access`.

    `num_classes`: 0 = unconditional, labels come as -1; otherwise labels outside 0..num_classes-1 are refused. `flip`:
    mirror half of the samples, keyed by seed and position. `on_error`: `strict` raises at the first bad sample,
    `skip` replaces it by the next good sample of its shard (see `SkippingReader`), counts it in `counters`, and stops
    when more than `max_bad_share` of the images (of at least 1,000) had to be replaced. Raises DataError.

    The state of a loader is `images_seen` (kept by the trainer) and `fingerprint`. Each `iter()` starts at
    `images_seen` again and ends the one before. Call `close()` when done, or use it as a context manager.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        image_size: int,
        channels: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        images_seen: int = 0,
        num_workers: int = 0,
        prefetch_batches: int = 4,
        num_canonical_nodes: int = 1,
        shuffle_block: int = 65536,
        flip: bool = False,
        on_error: str = "strict",
        max_bad_share: float = 0.01,
        num_classes: int = 0,
        pin_memory: bool = False,
        reader: str = "auto",
        cache_dir: str | None = None,
        cache_bytes: int = 32 << 30,
        timeout_s: float = 30.0,
        retries: int = 5,
    ) -> None:
        check_world(global_batch_size, rank, world_size)
        _check_numbers(image_size, channels, images_seen, num_workers, prefetch_batches, max_bad_share, on_error)
        access = Access(cache_dir, cache_bytes, timeout_s, retries)
        access.check()
        self.global_batch_size = global_batch_size
        self.rank, self.world_size = rank, world_size
        self.images_seen = images_seen
        self.num_workers, self.prefetch_batches = num_workers, prefetch_batches
        self.max_bad_share = max_bad_share
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.counters: Counter[str] = Counter()
        self.spec = Spec(
            data=address(data) or str(data), fingerprint="", image_size=image_size, channels=channels,
            num_classes=num_classes, on_error=on_error, seed=seed, flip=flip, access=access,
        )  # fmt: skip
        self.layout = Layout(global_batch_size // world_size, image_size, channels)
        self._delivered = 0
        self._stop: Callable[[], None] = lambda: None
        self._pids: Callable[[], list[int]] = list
        self._ahead: FetchAhead | None = None
        self.reader = choose_reader(data, reader)
        if self.reader == "stream":
            self.shards = stream_shards(data)
            self._buffer = min(shuffle_block, _STREAM_BUFFER)
            if rank == 0:
                log.warning("%d shards as streams, without an index: the order depends on the number of ranks, and a resume "
                            "goes to the nearest shard; first %s", len(self.shards), self.shards[0])  # fmt: skip
            return
        self.index = open_index(data, access)
        self.reader = check_form(self.index, reader)
        self.spec = replace(self.spec, fingerprint=self.index.fingerprint)
        self.order = Order(
            self.index.shard_sizes, seed=seed, num_canonical_nodes=num_canonical_nodes, shuffle_block=shuffle_block
        )
        check_labels(self.index, num_classes, on_error)
        if self.index.any_remote and access.cache_bytes:
            ShardCache(access.folder(), access.cache_bytes).sweep()
        if rank == 0:
            _log_data(self.index)

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
        if self.index.any_remote and self.spec.access.cache_bytes:
            self._ahead = FetchAhead(
                self.index, self.spec.access, self.global_batch_size, self.images_seen, self._share_of_order()
            )
        return self._with_processes() if self.num_workers else self._delivering(self._from_samples())

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

    def _plan(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """(images_seen, slots, stream positions, ids) of each batch, int64 [b]."""
        seen = self.images_seen
        while True:
            slots = self.order.slots(seen, self.global_batch_size, self.rank, self.world_size)
            positions = seen + slots
            yield seen, slots, positions, self.order.ids(positions)
            seen += self.global_batch_size

    def _share_of_order(self) -> Callable[[int, int], np.ndarray]:
        """(position, batches) -> ids of this rank's samples there; an order of its own, since the caches of one are not
        to be shared between threads."""
        order, size = self.order.copy(), self.global_batch_size

        def ids(position: int, batches: int) -> np.ndarray:
            starts = range(position, position + batches * size, size)
            return order.ids(
                np.concatenate([seen + order.slots(seen, size, self.rank, self.world_size) for seen in starts])
            )

        return ids

    def _delivering(self, produced: Iterator[tuple[Batch, list[Skipped]]]) -> Iterator[Batch]:
        """Batches made in a background thread."""
        batches = Prefetched(produced, self.prefetch_batches)
        self._stop = batches.close
        for batch, skipped in batches:
            self._account(skipped)
            yield batch

    def _empty(self) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """(images uint8 [b, H, W, C], labels int64 [b], ids int64 [b]) to be filled."""
        rows, size = self.layout.rows, self.layout.image_size
        images = torch.empty((rows, size, size, self.layout.channels), dtype=torch.uint8, pin_memory=self.pin_memory)
        return images, np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.int64)

    def _from_samples(self) -> Iterator[tuple[Batch, list[Skipped]]]:
        producer = Producer(self.spec)
        for seen, slots, positions, ids in self._plan():
            images, labels, delivered = self._empty()
            skipped = producer.fill(ids, positions, images.numpy(), labels, delivered)
            yield _batch(images, labels, delivered, slots, seen), skipped

    def _from_stream(self) -> Iterator[tuple[Batch, list[Skipped]]]:
        spec, share = self.spec, self.layout.rows
        source = StreamSource(
            self.shards, image_size=spec.image_size, channels=spec.channels, num_classes=spec.num_classes,
            strict=spec.on_error == "strict", seed=spec.seed, rank=self.rank, world_size=self.world_size,
            samples_seen=self.images_seen * share // self.global_batch_size, buffer=self._buffer,
            counts_folder=spec.access.folder(),
        )  # fmt: skip
        slots = np.arange(self.rank * share, (self.rank + 1) * share, dtype=np.int64)
        seen = self.images_seen
        while True:
            images, labels, ids = self._empty()
            mirrored = flips(spec.seed, seen + slots) if spec.flip else np.zeros(share, dtype=bool)
            for row, image in enumerate(images.numpy()):
                labels[row], ids[row] = source.read_into(image)
                if mirrored[row]:
                    image[...] = image[:, ::-1].copy()
            skipped, source.skipped = source.skipped, []
            yield _batch(images, labels, ids, slots, seen), skipped
            seen += self.global_batch_size

    def _with_processes(self) -> Iterator[Batch]:
        pool = WorkerPool(self.spec, self.layout, self.num_workers, self.prefetch_batches)
        self._stop, self._pids = pool.close, pool.pids
        register = _PinnedMemory(pool) if self.pin_memory else None
        plan = self._plan()
        ahead: deque[tuple[int, int, np.ndarray]] = deque()
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
            yield _batch(images, labels, delivered, slots, seen)
            del images  # or the slot would be held until the next batch is there

    def _account(self, skipped: list[Skipped]) -> None:
        """Count replaced samples of a batch that is handed out; stop the run above the allowed share."""
        self._delivered += self.layout.rows
        if self._ahead is not None:
            self._ahead.reached(self.images_seen + self._delivered * self.world_size)
        for bad in skipped:
            self.counters[bad.cause] += 1
            if self.counters.total() <= _NAMED:
                log.warning("replaced a bad sample (%s): %s", bad.cause, bad.message)
            if self.counters.total() == _NAMED:
                log.warning("further bad samples are only counted")
        bad_count = self.counters.total()
        if skipped and bad_count > self.max_bad_share * max(self._delivered, _SHARE_FLOOR):
            causes = ", ".join(f"{cause} {count}" for cause, count in sorted(self.counters.items()))
            self.close()
            raise DataError(
                f"{bad_count} of {self._delivered} images had to be replaced ({causes}), more than "
                f"data.max_bad_share={self.max_bad_share} allows; last: {skipped[-1].message}"
            )


def eval_batches(
    data: str | Path,
    *,
    image_size: int,
    channels: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    num_classes: int = 0,
    on_error: str = "strict",
    access: Access | None = None,
) -> Iterator[Batch]:
    """Each sample once, in index order, without padding; `slots` equal `ids`, `images_seen` is the first place.

    `limit`: only so many samples, spread evenly over the index (shards may be sorted by class). Every rank gets a
    stretch of its own; stretches differ by at most one sample, so ranks may make a different number of batches and
    must not meet in a collective per batch. Bad samples raise, or with on_error=skip are left out and logged.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError(f"batch_size {batch_size} and limit {limit} must be at least 1")
    check_world(world_size, rank, world_size)
    _check_numbers(image_size, channels, 0, 0, 1, 0.0, on_error)
    access = access or Access()
    index = open_index(data, access)
    if index.num_samples == 0:
        raise DataError(f"the data set at {data} holds no samples")
    check_labels(index, num_classes, on_error)
    total = index.num_samples if limit is None else min(limit, index.num_samples)
    first, last = rank * total // world_size, (rank + 1) * total // world_size

    def produce() -> Iterator[Batch]:
        reader = SampleReader(index, image_size, channels, num_classes, open_shards(index, access))
        for start in range(first, last, batch_size):
            places = np.arange(start, min(start + batch_size, last), dtype=np.int64)
            good: list[tuple[np.ndarray, int, int]] = []
            for sample in (places * index.num_samples // total).tolist():
                try:
                    image, label = reader.read(sample)
                except BadSampleError as err:
                    if on_error == "strict":
                        raise DataError(f"{err}; on_error=skip leaves such samples out") from None
                    log.warning("left out a bad sample (%s): %s", err.cause, err)
                    continue
                good.append((image, label, sample))
            if good:
                images = torch.from_numpy(np.stack([image for image, _, _ in good]))
                ids = np.array([sample for _, _, sample in good], dtype=np.int64)
                yield _batch(images, np.array([label for _, label, _ in good], dtype=np.int64), ids, ids, start)

    return iter(Prefetched(produce(), 2))


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


def _batch(images: torch.Tensor, labels: np.ndarray, ids: np.ndarray, slots: np.ndarray, seen: int) -> Batch:
    """`images`: uint8 [b, H, W, C]."""
    return Batch(
        images=images.permute(0, 3, 1, 2),
        labels=torch.from_numpy(labels),
        ids=torch.from_numpy(ids),
        slots=torch.from_numpy(np.array(slots, dtype=np.int64)),
        images_seen=seen,
    )


def _check_numbers(
    image_size: int, channels: int, images_seen: int, num_workers: int, prefetch: int, bad_share: float, on_error: str
) -> None:
    for name, value, right in (
        ("image_size", image_size, image_size >= 1),
        ("channels", channels, channels in (1, 3)),
        ("images_seen", images_seen, images_seen >= 0),
        ("num_workers", num_workers, num_workers >= 0),
        ("prefetch_batches", prefetch, prefetch >= 1),
        ("max_bad_share", bad_share, 0 <= bad_share <= 1),
        ("on_error", on_error, on_error in ("strict", "skip")),
    ):
        if not right:
            raise DataError(f"data.{name} cannot be {value!r}")


def _log_data(index: Index) -> None:
    named = f", {index.num_classes} classes" if index.num_classes else ""
    log.info(
        "%s: %d shards, %d samples%s, fingerprint %s",
        index.root, len(index.shard_sizes), index.num_samples, named, index.fingerprint,
    )  # fmt: skip
    empty = [index.shard_paths[i] for i in np.flatnonzero(index.shard_sizes == 0)]
    if empty:
        log.warning("%d shards are empty: %s", len(empty), ", ".join(empty[:10]) + " ..." * (len(empty) > 10))
