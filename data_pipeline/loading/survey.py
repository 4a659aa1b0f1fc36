"""A data set as seen before training: what its index says, and a look at a few of its images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.images.bounds import check_bytes
from tarflow.data_pipeline.images.look import Look, look_at, look_at_pixels
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.choose_reader import DataFacts, data_facts, rule_of
from tarflow.data_pipeline.loading.custom.code import Function, Named
from tarflow.data_pipeline.loading.custom.dataset import CustomDataset, looked_at
from tarflow.data_pipeline.loading.custom.transform import Transform
from tarflow.data_pipeline.loading.sample_reader import reader_of
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import ImageShape
from tarflow.data_pipeline.storage.remote_shards import open_shards, unchecked
from tarflow.image_size import shown

LOOKED_AT = 16  # images; of a remote set, a quarter of that


@dataclass(frozen=True)
class DataSurvey:
    """What a look at a data set shows.

    `place`: the path or address, or the function that gives the data. `looks`: at a few images, spread evenly; fewer where
    some cannot be read, none of a stream, of which neither length nor classes are known. `labels`: of those images, where
    there is no index that knows them all.
    """

    place: str
    facts: DataFacts
    looks: tuple[Look, ...] = ()
    unchecked: str | None = None  # why fetched bytes are not checked against the index
    labels: tuple[int, ...] = ()
    transform: Function | None = None  # what training images go through
    crop: str = "centre"  # the rule by which images of another size than the model's are cropped

    @property
    def index(self) -> Index | None:
        """The index of the set; None of a stream."""
        return self.facts.index

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, in label order, where the index has them."""
        return self.facts.classes

    @property
    def num_classes(self) -> int:
        """Classes, named or counted by the largest label; 0 without labels, and where that is not known."""
        return self.facts.num_classes or 0 if self.labelled else 0

    @property
    def labelled(self) -> bool:
        """Whether any sample has a label, as far as is known."""
        return bool(self.labels) or (self.index is not None and self.index.unlabelled < self.index.num_samples)

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
            parts.append(shown(self.image_size[::-1]))
        elif self.sides:
            parts.append(f"of several sizes (shorter sides of {self.sides[0]} to {self.sides[-1]} px)")
        if self.channels:
            parts.append("RGB" if self.channels == 3 else "grey")
        count = self.num_classes
        labels = f"{count} class{'es' * (count != 1)}" if count else "labels" if self.labelled else "no labels"
        return ", ".join([*parts, labels])

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
            "crop": self.crop,
            "unchecked": self.unchecked,
        } | self.describe_code()

    def describe_code(self) -> dict[str, object]:
        """The functions of the user's that the data go through; nothing where there are none."""
        given = {"dataset": self.facts.custom.function if self.facts.custom else None, "transform": self.transform}
        return {name: function.describe() for name, function in given.items() if function is not None}


def survey(data: DataSettings, channels: int = 3) -> DataSurvey:
    """Open the index of `data.train`, or the user's own data, and look at a few images; or list a stream's shards.

    Nothing is written: of remote shards only those images are fetched, without the node's cache. Raises DataError, also where
    `data.dataset` or `data.transform` do not give the same twice. `channels`: of the images that a transform gets.
    """
    named = data.code("transform")
    facts = data_facts(data)
    transform = None if named is None else _checked_transform(named, data, facts, channels)
    rule = rule_of(data, facts.custom or facts.index)
    if facts.custom is not None:
        return replace(_survey_custom(data, facts, facts.custom, transform), crop=rule)
    if facts.index is None:
        return DataSurvey(data.train, facts, crop=rule)
    looks = tuple(_looks(facts.index, data))
    return DataSurvey(data.train, facts, looks, unchecked(facts.index, data.access), transform=transform, crop=rule)


def _survey_custom(
    data: DataSettings, facts: DataFacts, custom: CustomDataset, transform: Function | None
) -> DataSurvey:
    looks, labels = [], []
    for sample in looked_at(custom.num_samples):
        try:
            pixels, label = custom.read(sample, 3, data.max_image_pixels)
        except BadSampleError as error:
            if data.on_error == "strict":
                raise DataError(str(error)) from None
            continue
        looks.append(look_at_pixels(pixels))
        labels += [label] if label is not None else []
    return DataSurvey(data.place, facts, tuple(looks), labels=tuple(labels), transform=transform)


def _checked_transform(name: str, data: DataSettings, facts: DataFacts, channels: int) -> Function:
    """The transform, once it was seen to make the same of an image twice."""
    transform = Transform(Named(name), 0, data.max_image_pixels)
    opened = facts.custom or facts.index
    if opened is None or (facts.index is not None and facts.index.any_remote):
        return transform.function  # a stream has none, and of remote data no more is fetched than is looked at
    reader = reader_of(opened, ImageShape(1, channels), data.access, data.max_image_pixels)
    for sample in range(min(2, reader.num_samples)):
        try:
            transform.check(reader.read_full(sample)[0], sample)
        except BadSampleError as error:
            if data.on_error == "strict":
                raise DataError(str(error)) from None
    return transform.function


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
