"""Batches of a user's own data set, in the exact order of `order`."""

from __future__ import annotations

import logging

from tarflow.data_pipeline.loading.choose_reader import open_custom, rule_of
from tarflow.data_pipeline.loading.indexed import OrderedSource, spec_of
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape

log = logging.getLogger("tarflow.data")


class CustomSource(OrderedSource):
    """See `BatchSource`. Raises DataError where the function cannot be imported or gives no data set."""

    reader = "custom"

    def __init__(self, settings: DataSettings, shape: ImageShape, shard: BatchShard, pin_memory: bool) -> None:
        data = open_custom(settings)
        spec = spec_of(
            settings,
            shape,
            shard,
            data.fingerprint,
            dataset=data.function.named,
            crop=rule_of(settings, data),
        )
        super().__init__(settings, shard, pin_memory, data.shard_sizes, spec, data)
        if shard.rank == 0:
            log.info("%s: %s samples, fingerprint %s", data.root, f"{data.num_samples:,}", data.fingerprint)
