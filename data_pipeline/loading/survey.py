"""A data set as seen before training: what its index says, and a look at a few of its images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.images.bounds import check_bytes
from tarflow.data_pipeline.images.look import Look, look_at
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.choose_reader import DataFacts, data_facts
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.storage.remote_shards import open_shards, unchecked

LOOKED_AT = 16  # images; of a remote set, a quarter of that


@dataclass(frozen=True)
class DataSurvey:
    """What a look at a data set shows.

    `place`: the path or address. `looks`: at a few images, spread evenly; fewer where some cannot be read, none of a
    stream, of which neither length nor classes are known.
    """

    place: str
    facts: DataFacts
    looks: tuple[Look, ...] = ()
    unchecked: str | None = None  # why fetched bytes are not checked against the index

    @property
    def index(self) -> Index | None:
        """The index of the set; None of a stream."""
        return self.facts.index

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, in label order, where the index has them."""
        return None if self.index is None else self.index.classes

    @property
    def num_classes(self) -> int:
        """Classes, named or counted by the largest label; 0 without labels, and where that is not known."""
        return self.facts.num_classes or 0 if self.labelled else 0

    @property
    def labelled(self) -> bool:
        """Whether any sample has a label, as far as is known."""
        return self.index is not None and self.index.unlabelled < self.index.num_samples

    @property
    def channels(self) -> int | None:
        """3 where any of the images looked at shows colours, 1 where none does, None where none could be read."""
        return None if not self.looks else 1 if all(look.grey for look in self.looks) else 3

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(width, height) in pixels, if all images share it as far as is known."""
        if self.index is not None and self.index.image_size:
            return self.index.image_size
        sizes = {(look.width, look.height) for look in self.looks}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def sides(self) -> list[int]:
        """The shorter side of each image looked at, in pixels, ascending."""
        return sorted(min(look.width, look.height) for look in self.looks)

    def __str__(self) -> str:
        """`523 images, 32 x 32, RGB, 4 classes`."""
        if self.facts.num_samples is None:
            return "a stream, whose length, image size and classes are not known"
        parts = [f"{self.facts.num_samples:,} image{'s' * (self.facts.num_samples != 1)}"]
        if self.image_size:
            parts.append("{} x {}".format(*self.image_size))
        elif self.sides:
            parts.append(f"of several sizes (shorter sides of {self.sides[0]} to {self.sides[-1]} px)")
        if self.channels:
            parts.append("RGB" if self.channels == 3 else "grey")
        count = self.num_classes
        return ", ".join([*parts, f"{count} class{'es' * (count != 1)}" if self.labelled else "no labels"])

    def describe(self) -> dict[str, object]:
        """Plain values, for a run's record of its data."""
        return {
            "place": self.place,
            "fingerprint": self.facts.fingerprint,
            "num_samples": self.facts.num_samples,
            "classes": self.classes,
            "num_classes": self.num_classes,
            "image_size": list(self.image_size) if self.image_size else None,
            "channels": self.channels,
            "unchecked": self.unchecked,
        }


def survey(data: DataSettings) -> DataSurvey:
    """Open the index of `data.train` and look at a few images, or list a stream's shards. Raises DataError.

    Nothing is written: of remote shards only those images are fetched, without the node's cache.
    """
    facts = data_facts(data)
    if facts.index is None:
        return DataSurvey(data.train, facts)
    return DataSurvey(data.train, facts, tuple(_looks(facts.index, data)), unchecked(facts.index, data.access))


def _looks(index: Index, data: DataSettings) -> Iterator[Look]:
    files = open_shards(index, replace(data.access, cache_bytes=0))
    count = LOOKED_AT // 4 if index.any_remote else LOOKED_AT
    try:
        for sample in np.unique(np.linspace(0, index.num_samples - 1, count).astype(np.int64)).tolist():
            shard, row = index.locate(sample)
            rows = index.rows(shard)
            try:
                check_bytes(int(rows.sizes[row]))
                look = look_at(files.read(shard, int(rows.offsets[row]), int(rows.sizes[row])))
            except BadSampleError as error:
                if data.on_error == "strict" and not index.is_remote(shard):
                    raise DataError(f"{index.where(sample)}: {error}") from None
                continue
            except DataError:
                if not index.is_remote(shard):
                    raise
                return  # a server without ranges, or an outage: training will report it if it lasts
            if look is not None:
                yield look
    finally:
        files.close()
