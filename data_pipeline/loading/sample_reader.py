"""From a sample id to its label and pixels: the index says where the bytes are, `ShardFiles` reads them.

`SkippingReader` adds the policy for bad samples to this reader, or to that of a user's own data (`custom.reader`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS, check_bytes
from tarflow.data_pipeline.images.crop import CENTRE, Crop
from tarflow.data_pipeline.images.decode import decode, decode_into
from tarflow.data_pipeline.index.index import NO_LABEL, Index
from tarflow.data_pipeline.loading.custom.dataset import CustomDataset
from tarflow.data_pipeline.loading.custom.reader import CustomReader
from tarflow.data_pipeline.loading.custom.transform import Transform
from tarflow.data_pipeline.loading.shape import ImageShape
from tarflow.data_pipeline.storage.access import Access
from tarflow.data_pipeline.storage.local_shards import LocalShards, ShardFiles
from tarflow.data_pipeline.storage.remote_shards import open_shards


class Reader(Protocol):
    """Reads samples by id, at the shape that the model takes."""

    @property
    def root(self) -> object:
        """What messages call the data set."""

    @property
    def num_samples(self) -> int:
        """Samples in the data set."""

    def read_into(self, sample: int, out: NDArray[np.uint8], epoch: int | None = None) -> int:
        """See `SampleReader.read_into`."""

    def read(self, sample: int) -> tuple[NDArray[np.uint8], int]:
        """See `SampleReader.read`."""

    def read_full(self, sample: int) -> tuple[NDArray[np.uint8], int]:
        """See `SampleReader.read_full`."""

    def others(self, sample: int) -> Iterator[int]:
        """The other samples, in the order in which they replace a bad one."""

    def close(self) -> None:
        """Close what was opened."""


def reader_of(
    data: Index | CustomDataset, shape: ImageShape, access: Access, max_pixels: int = MAX_PIXELS, crop: Crop = CENTRE
) -> Reader:
    """Reads an indexed data set, or a user's own; without a transform, which is for training."""
    if isinstance(data, CustomDataset):
        return CustomReader(data, shape, max_pixels, crop=crop)
    return SampleReader(data, shape, open_shards(data, access), max_pixels, crop=crop)


class SampleReader:
    """Reads samples of an indexed data set at the shape that the model takes.

    `files`: where the bytes come from; by default the shards next to the index. `max_pixels`: limit on an image.
    `transform`: applied to training images. `crop`: the rule by which images get the model's size.
    """

    def __init__(
        self, index: Index, shape: ImageShape, files: ShardFiles | None = None, max_pixels: int = MAX_PIXELS,
        transform: Transform | None = None, crop: Crop = CENTRE,
    ) -> None:  # fmt: skip
        self.index, self.root, self.num_samples = index, index.root, index.num_samples
        self.transform, self.crop = transform, crop
        self.shape = shape
        self.max_pixels = max_pixels
        self.files: ShardFiles = files or LocalShards(index)
        self._starts: list[int] = (
            index.shard_starts.tolist()
        )  # bisecting a list is faster than searching an array for one sample at a time

    def read(self, sample: int) -> tuple[NDArray[np.uint8], int]:
        """(uint8 [H, W, channels] of the model's size, label). Raises BadSampleError naming shard and key."""
        image = np.empty(self.shape.pixels, dtype=np.uint8)
        return image, self.read_into(sample, image)

    def read_into(self, sample: int, out: NDArray[np.uint8], epoch: int | None = None) -> int:
        """Write the image into `out`, contiguous uint8 [H, W, channels] of the model's size; returns the label.

        A JPEG of that size is decoded straight into `out`, without a copy. `epoch`: of a training image, to which the
        transform is applied, at the image's own size. Raises BadSampleError naming shard and key; `out` is then undefined.
        """
        try:
            data, label = self._fetch(sample)
            size, changed = self.shape.image_size, self.transform is not None and epoch is not None
            drawn = self.crop.is_random and epoch is not None
            if changed or drawn or not decode_into(data, out):
                at_least = size if self.crop.reduced_ok and not changed else None
                image = decode(data, self.shape.channels, at_least, self.max_pixels)
                if self.transform is not None and epoch is not None:
                    image = self.transform(image, epoch, sample)
                out[...] = self.crop(image, size, epoch, sample)
            return label
        except BadSampleError as err:
            raise BadSampleError(err.cause, f"{self.index.where(sample)}: {err}") from None

    def read_full(self, sample: int) -> tuple[NDArray[np.uint8], int]:
        """(uint8 [H, W, channels] as stored, label). Raises BadSampleError naming shard and key."""
        try:
            data, label = self._fetch(sample)
            return decode(data, self.shape.channels, None, self.max_pixels), label
        except BadSampleError as err:
            raise BadSampleError(err.cause, f"{self.index.where(sample)}: {err}") from None

    def close(self) -> None:
        """Close the shards."""
        self.files.close()

    def _fetch(self, sample: int) -> tuple[bytes, int]:
        shard = bisect_right(self._starts, sample) - 1
        row = sample - self._starts[shard]
        rows = self.index.rows(shard)
        stored = int(rows.labels[row])
        label = self.shape.label(None if stored == NO_LABEL else stored)
        check_bytes(int(rows.sizes[row]))
        return self.files.read(shard, int(rows.offsets[row]), int(rows.sizes[row])), label

    def others(self, sample: int) -> Iterator[int]:
        """Those of its shard, the next one first and after the last the first; then those of the following shards."""
        index = self.index
        shard, row = index.locate(sample)
        size = int(index.shard_sizes[shard])
        start = int(index.shard_starts[shard])
        for step in range(1, size):
            yield start + (row + step) % size
        for step in range(1, len(index.shard_sizes)):
            other = (shard + step) % len(index.shard_sizes)
            yield from range(int(index.shard_starts[other]), int(index.shard_starts[other + 1]))


@dataclass
class Skipped:
    """A sample that was replaced: its id, the cause, the message, and the id of its replacement."""

    sample: int
    cause: str
    message: str
    replacement: int


class SkippingReader:
    """A reader with the policy for bad samples.

    `strict`: the first bad sample raises. `skip`: a bad sample is replaced by the next good one of its shard in index
    order (after the last comes the first), or, where the whole shard is bad, of the following shards. The rule depends
    on the data alone, so every rank takes the same number of steps and every worker finds the same replacement.
    """

    def __init__(self, reader: Reader, on_error: str) -> None:
        if on_error not in ("strict", "skip"):
            raise DataError(f"on_error is {on_error!r}, it must be strict or skip (setting data.on_error)")
        self.reader = reader
        self.strict = on_error == "strict"
        self._bad: dict[int, Skipped] = {}

    def read_into(
        self, sample: int, out: NDArray[np.uint8], epoch: int | None = None
    ) -> tuple[int, int, Skipped | None]:
        """Fill `out` as `SampleReader.read_into`; (label, id of the sample delivered, what was skipped or None)."""
        known = self._bad.get(sample)
        if known is not None:
            return self.reader.read_into(known.replacement, out, epoch), known.replacement, known
        try:
            return self.reader.read_into(sample, out, epoch), sample, None
        except BadSampleError as err:
            if self.strict:
                raise DataError(f"{err}; data.on_error=skip replaces such samples and counts them") from None
            first = err
        for candidate in self.reader.others(sample):
            try:
                label = self.reader.read_into(candidate, out, epoch)
            except BadSampleError:
                continue
            skipped = Skipped(sample, first.cause, str(first), candidate)
            if len(self._bad) < 100_000:
                self._bad[sample] = skipped
            return label, candidate, skipped
        raise DataError(f"no sample of {self.reader.root} can be read, last: {first}")


def check_labels(index: Index, num_classes: int, on_error: str) -> None:
    """Raise DataError, naming a sample, unless the labels fit a model with `num_classes`. Reads no samples.

    The index knows the smallest and largest label of each shard, so this costs nothing. With on_error=skip only a data
    set without any labels is refused; single samples are replaced and counted when they are drawn.
    """
    if num_classes == 0:
        return
    if index.unlabelled == index.num_samples:
        raise DataError(
            f"the data set at {index.root} has no labels, the model has {num_classes} classes: set model.num_classes=0"
        )
    if on_error != "strict":
        return
    # A shard without any label has no largest one; it is reported as lacking labels, below.
    with_labels = index.label_max != NO_LABEL
    wrong = np.flatnonzero(with_labels & ((index.label_max >= num_classes) | (index.label_min < 0)))
    if len(wrong):
        shard = int(wrong[0])
        labels = index.rows(shard).labels
        row = int(np.flatnonzero((labels != NO_LABEL) & ((labels < 0) | (labels >= num_classes)))[0])
        raise DataError(
            f"shard {index.shard_place(shard)}, sample {index.key(shard, row)!r}: label {labels[row]} is outside "
            f"0..{num_classes - 1} (model.num_classes={num_classes}; {len(wrong)} shards hold such labels)"
        )
    if index.unlabelled:
        for shard in range(len(index.shard_sizes)):
            missing = np.flatnonzero(index.rows(shard).labels == NO_LABEL)
            if len(missing):
                raise DataError(
                    f"shard {index.shard_place(shard)}, sample {index.key(shard, int(missing[0]))!r} has no label "
                    f"({index.unlabelled} such samples): data.on_error=skip replaces them, or set model.num_classes=0"
                )
