"""From a sample id to its bytes, its label and its pixels: positioned reads out of the tars, named by the index.

Nothing is held but a bounded number of open files and the index's cache, so a killed reader leaves nothing behind.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.decode import decode
from data_pipeline.errors import BadSampleError, DataError
from data_pipeline.index import NO_LABEL, Index
from data_pipeline.transform import fit

_OPEN_FILES = 64


class SampleReader:
    """Reads samples of an indexed data set as squares of `image_size` pixels with `channels` channels.

    `num_classes` 0: labels are not wanted and come as -1. Otherwise every label must be in 0 .. num_classes-1.
    """

    def __init__(self, index: Index, image_size: int, channels: int, num_classes: int) -> None:
        self.index = index
        self.image_size = image_size
        self.channels = channels
        self.num_classes = num_classes
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, sample: int) -> tuple[np.ndarray, int]:
        """(uint8 [image_size, image_size, channels], label). Raises BadSampleError naming shard and key."""
        image, label = self._read(sample, at_least=self.image_size)
        return fit(image, self.image_size), label

    def read_full(self, sample: int) -> tuple[np.ndarray, int]:
        """(uint8 [H, W, channels] as stored, label). Raises BadSampleError naming shard and key."""
        return self._read(sample, at_least=None)

    def _read(self, sample: int, at_least: int | None) -> tuple[np.ndarray, int]:
        shard, row = self.index.locate(sample)
        rows = self.index.rows(shard)
        try:
            label = self._label(int(rows.labels[row]))
            data = self._bytes(shard, int(rows.offsets[row]), int(rows.sizes[row]))
            return decode(data, self.channels, at_least=at_least), label
        except BadSampleError as err:
            raise BadSampleError(err.cause, f"{self.index.where(sample)}: {err}") from None

    def close(self) -> None:
        """Close the shards."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _label(self, label: int) -> int:
        if self.num_classes == 0:
            return -1
        if label == NO_LABEL:
            raise BadSampleError("missing_label", f"has no label, the model has {self.num_classes} classes")
        if not 0 <= label < self.num_classes:
            raise BadSampleError("label_out_of_range", f"label {label} is outside 0..{self.num_classes - 1}")
        return label

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        fd = self._files.get(shard)
        if fd is None:
            fd = self._open(shard)
        else:
            self._files.move_to_end(shard)
        try:
            data = os.pread(fd, size, offset)
        except OSError as err:
            raise BadSampleError("unreadable", f"cannot read {size} bytes at {offset}: {err.strerror}") from None
        if len(data) < size:
            raise BadSampleError("cut_short", f"only {len(data)} of {size} bytes at {offset} are there")
        return data

    def _open(self, shard: int) -> int:
        path = self.index.shard_path(shard)
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as err:
            raise BadSampleError("missing_shard", f"cannot open the shard: {err.strerror}") from None
        size, expected = os.fstat(fd).st_size, int(self.index.shard_bytes[shard])
        if size != expected:
            os.close(fd)
            raise DataError(
                f"shard {path} has {size} bytes, the index says {expected}: it was changed after indexing; "
                f"run `tarflow data index {self.index.root}`"
            )
        while len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = fd
        return fd


@dataclass
class Skipped:
    """One sample that was replaced: its id, the cause, what was wrong, and the id that stands in for it."""

    sample: int
    cause: str
    message: str
    replacement: int


class SkippingReader:
    """A SampleReader with the policy for bad samples.

    `strict`: the first bad sample raises. `skip`: a bad sample is replaced by the next good one of its shard in index
    order (after the last comes the first), or, where the whole shard is bad, of the following shards. The rule depends
    on the data alone: every rank and worker takes the same number of steps and finds the same replacement.
    """

    def __init__(self, reader: SampleReader, on_error: str) -> None:
        if on_error not in ("strict", "skip"):
            raise DataError(f"on_error is {on_error!r}, it must be strict or skip (setting data.on_error)")
        self.reader = reader
        self.strict = on_error == "strict"
        self._bad: dict[int, Skipped] = {}

    def read(self, sample: int) -> tuple[np.ndarray, int, int, Skipped | None]:
        """(image, label, id of the sample delivered, what was skipped or None)."""
        known = self._bad.get(sample)
        if known is not None:
            image, label = self.reader.read(known.replacement)
            return image, label, known.replacement, known
        try:
            image, label = self.reader.read(sample)
            return image, label, sample, None
        except BadSampleError as err:
            if self.strict:
                raise DataError(f"{err}; data.on_error=skip replaces such samples and counts them") from None
            first = err
        for candidate in self._candidates(sample):
            try:
                image, label = self.reader.read(candidate)
            except BadSampleError:
                continue
            skipped = Skipped(sample, first.cause, str(first), candidate)
            if len(self._bad) < 100_000:
                self._bad[sample] = skipped
            return image, label, candidate, skipped
        raise DataError(f"no sample of {self.reader.index.root} can be read, last: {first}")

    def _candidates(self, sample: int) -> Iterator[int]:
        index = self.reader.index
        shard, row = index.locate(sample)
        size = int(index.shard_sizes[shard])
        start = int(index.shard_starts[shard])
        for step in range(1, size):
            yield start + (row + step) % size
        for step in range(1, len(index.shard_sizes)):
            other = (shard + step) % len(index.shard_sizes)
            yield from range(int(index.shard_starts[other]), int(index.shard_starts[other + 1]))


def check_labels(index: Index, num_classes: int, on_error: str) -> None:
    """Before anything is read: do the labels suit a model with `num_classes`? Raises DataError naming a sample.

    The index knows the smallest and largest label of each shard, so this costs nothing. With on_error=skip only a data
    set without any usable label is refused; single samples are replaced and counted when they come up.
    """
    if num_classes == 0:
        return
    if index.unlabelled == index.num_samples:
        raise DataError(
            f"the data set at {index.root} has no labels, the model has {num_classes} classes: set model.num_classes=0"
        )
    if on_error != "strict":
        return
    with_labels = index.label_max != NO_LABEL
    wrong = np.flatnonzero(with_labels & ((index.label_max >= num_classes) | (index.label_min < 0)))
    if len(wrong):
        shard = int(wrong[0])
        labels = index.rows(shard).labels
        row = int(np.flatnonzero((labels != NO_LABEL) & ((labels < 0) | (labels >= num_classes)))[0])
        raise DataError(
            f"shard {index.shard_path(shard)}, sample {index.key(shard, row)!r}: label {labels[row]} is outside "
            f"0..{num_classes - 1} (model.num_classes={num_classes}; {len(wrong)} shards hold such labels)"
        )
    if index.unlabelled:
        for shard in range(len(index.shard_sizes)):
            missing = np.flatnonzero(index.rows(shard).labels == NO_LABEL)
            if len(missing):
                raise DataError(
                    f"shard {index.shard_path(shard)}, sample {index.key(shard, int(missing[0]))!r} has no label "
                    f"({index.unlabelled} such samples): data.on_error=skip replaces them, or set model.num_classes=0"
                )
