"""Loaders for tests."""

from dataclasses import fields
from typing import Any

from tarflow.data_pipeline.loading.loader import Loader
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape


def make_loader(data: Any, **options: Any) -> Loader:
    """A loader from single settings: each goes to the group that knows it."""

    def of(group: type) -> dict[str, Any]:
        return {f.name: options.pop(f.name) for f in fields(group) if f.name in options}

    shape, place = ImageShape(**of(ImageShape)), BatchShard(**of(BatchShard))
    return Loader(DataSettings.of(data, **options), shape, place)
