"""Batches of a stream of tars without an index."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.crop import Crop
from tarflow.data_pipeline.images.transform import flips
from tarflow.data_pipeline.loading.batch import Batch
from tarflow.data_pipeline.loading.choose_reader import rule_of
from tarflow.data_pipeline.loading.prefetch import Prefetched
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tarflow.data_pipeline.loading.source import Delivery, Position, empty_batch
from tarflow.data_pipeline.loading.stream.reader import StreamReader
from tarflow.data_pipeline.loading.stream.shards import stream_fingerprint, stream_shards

log = logging.getLogger("tarflow.data")

_BUFFER = 1000  # samples that are mixed; they are held as files, not as pixels


class StreamSource:
    """See `BatchSource`. Read by a background thread, whatever `data.num_workers` is. Raises DataError."""

    reader = "stream"

    def __init__(self, settings: DataSettings, shape: ImageShape, shard: BatchShard, pin_memory: bool) -> None:
        self.settings, self.shape, self.shard, self.pin_memory = settings, shape, shard, pin_memory
        if settings.transform is not None:
            raise DataError(
                f"data.transform={settings.transform} gets random numbers by epoch and image, which a stream does not know: "
                "give the data an index with `tarflow data index`"
            )
        self.crop = Crop(rule_of(settings))
        self.shards = stream_shards(settings.train)
        self._prefetched: Prefetched[Delivery] | None = None
        if shard.rank == 0:
            log.warning(
                "%d shards as streams, without an index: the order depends on the number of ranks, and a resume goes to the "
                "nearest shard; first %s", len(self.shards), self.shards[0],
            )  # fmt: skip

    @cached_property
    def fingerprint(self) -> str:
        """See `BatchSource`."""
        return stream_fingerprint(self.shards)

    @property
    def num_samples(self) -> int:
        """See `BatchSource`."""
        raise DataError("the number of samples in a stream is not known: data with an index have one")

    @property
    def order_settings(self) -> dict[str, int]:
        """See `BatchSource`."""
        return {"seed": self.shard.seed, "shuffle_block": self._buffer}

    @property
    def _buffer(self) -> int:
        return min(self.settings.shuffle_block, _BUFFER)

    def batches(self, position: Position) -> Iterator[Delivery]:
        """See `BatchSource`."""
        self.close()
        self._prefetched = Prefetched(self._decoded(position), self.settings.prefetch_batches)
        yield from self._prefetched

    def worker_pids(self) -> list[int]:
        """See `BatchSource`."""
        return []

    def close(self) -> None:
        """See `BatchSource`."""
        if self._prefetched is not None:
            self._prefetched.close()
        self._prefetched = None

    def _decoded(self, position: Position) -> Iterator[Delivery]:
        settings, shard, seen = self.settings, self.shard, position.images_seen
        reader = StreamReader(
            self.shards, self.shape, shard, position, strict=settings.on_error == "strict", buffer=self._buffer,
            counts_folder=settings.access.folder(), max_pixels=settings.max_image_pixels, crop=self.crop,
        )  # fmt: skip
        slots = np.arange(shard.rank * shard.size, (shard.rank + 1) * shard.size, dtype=np.int64)
        while True:
            images, labels, ids = empty_batch(shard.size, self.shape.pixels, self.pin_memory)
            mirrored = flips(shard.seed, seen + slots) if settings.flip else np.zeros(shard.size, dtype=bool)
            for row, image in enumerate(images.numpy()):
                labels[row], ids[row] = reader.read_into(image)
                if mirrored[row]:
                    image[...] = image[:, ::-1].copy()
            after = Position(seen + shard.global_batch_size, reader.cursor)
            replaced, reader.skipped = reader.skipped, []
            yield Delivery(Batch.of(images, labels, ids, slots, seen), replaced, after)
            seen = after.images_seen
