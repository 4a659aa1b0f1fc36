"""Batches for evaluation: each sample once, in index order, divided among the ranks without padding."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.images.crop import Crop
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.batch import Batch
from tarflow.data_pipeline.loading.choose_reader import open_data, rule_of
from tarflow.data_pipeline.loading.order import check_world
from tarflow.data_pipeline.loading.prefetch import Prefetched
from tarflow.data_pipeline.loading.sample_reader import check_labels, reader_of
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import ImageShape

log = logging.getLogger("tarflow.data")


def evaluation_batches(
    data: DataSettings, shape: ImageShape, batch_size: int, *, limit: int | None = None, rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:  # fmt: skip
    """Each sample of `data.train` once, in batches of at most `batch_size` per rank; pass `data.held_out` for held-out images.

    `slots` equal `ids`, `images_seen` is the index of a batch's first sample. `limit`: at most this many samples, spread
    evenly over the index, since shards may be sorted by class. Every rank gets a range of its own; ranges differ by at most
    one sample, so ranks may yield different numbers of batches: do not run a collective per batch.
    Bad samples raise DataError, or with on_error=skip are skipped and logged. `data.transform` and random crops are for
    training alone.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError(f"batch_size {batch_size} and limit {limit} must be at least 1")
    check_world(world_size, rank, world_size)
    index = open_data(data)
    if index.num_samples == 0:
        raise DataError(f"the data set at {data.train} holds no samples")
    crop = Crop(rule_of(data, index, training=False))
    if isinstance(index, Index):
        check_labels(index, shape.num_classes, data.on_error)
    total = index.num_samples if limit is None else min(limit, index.num_samples)
    first, last = rank * total // world_size, (rank + 1) * total // world_size

    def produce() -> Iterator[Batch]:
        reader = reader_of(index, shape, data.access, data.max_image_pixels, crop)
        for start in range(first, last, batch_size):
            places = np.arange(start, min(start + batch_size, last), dtype=np.int64)
            good: list[tuple[NDArray[np.uint8], int, int]] = []
            # Spread evenly over the index: with a limit, place p of `total` stands for this sample.
            for sample in (places * index.num_samples // total).tolist():
                try:
                    image, label = reader.read(sample)
                except BadSampleError as err:
                    if data.on_error == "strict":
                        raise DataError(f"{err}; on_error=skip skips such samples") from None
                    log.warning("skipped a bad sample (%s): %s", err.cause, err)
                    continue
                good.append((image, label, sample))
            if good:
                images = torch.from_numpy(np.stack([image for image, _, _ in good]))
                labels = np.array([label for _, label, _ in good], dtype=np.int64)
                ids = np.array([sample for _, _, sample in good], dtype=np.int64)
                yield Batch.of(images, labels, ids, ids, start)

    return iter(Prefetched(produce(), 2))
