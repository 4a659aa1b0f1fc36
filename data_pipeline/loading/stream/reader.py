"""The endless samples of one rank of a stream."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline import keyed
from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.images.crop import CENTRE, Crop
from tarflow.data_pipeline.images.decode import decode, decode_into
from tarflow.data_pipeline.images.formats import IMAGE_EXTENSIONS
from tarflow.data_pipeline.index.labels import parse_label
from tarflow.data_pipeline.loading.sample_reader import Skipped
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tarflow.data_pipeline.loading.source import Position, StreamCursor
from tarflow.data_pipeline.loading.stream.counts import ShardCounts
from tarflow.data_pipeline.loading.stream.tar import samples_of

log = logging.getLogger("tarflow.data")

_HOPELESS = 10_000
ROW_BITS = 32  # the id of a sample: number of its shard << 32 | its row


class StreamReader:
    """The endless samples of one rank, from the position `cursor`, or from the start of the shard nearest to `images_seen`.

    `read_into(out)` fills uint8 [H, W, channels] with the next good sample. `counts_folder`: where the sizes of
    shards are kept. Raises DataError: no samples in a whole round of shards, in strict mode the first bad one.
    """

    def __init__(
        self, shards: list[str], shape: ImageShape, shard: BatchShard, position: Position, *, strict: bool, buffer: int,
        counts_folder: Path, max_pixels: int = MAX_PIXELS, crop: Crop = CENTRE,
    ) -> None:  # fmt: skip
        self.shards = shards
        self.shape = shape
        self.strict = strict
        self.max_pixels, self.crop = max_pixels, crop
        self.seed, self.rank, self.world_size = shard.seed, shard.rank, shard.world_size
        self.buffer = buffer
        self.counts = ShardCounts(counts_folder, shards, f"{shard.rank}of{shard.world_size}")
        self.skipped: list[Skipped] = []  # since it was last emptied; `replacement` is -1
        self._orders: dict[int, NDArray[np.int64]] = {}
        cursor = position.cursor
        if cursor is None or (cursor.rank, cursor.world_size) != (
            self.rank,
            self.world_size,
        ):  # of another rank's shards
            cursor = self._at(self._nearest(position.images_seen * shard.size // shard.global_batch_size), 0)
        self.cursor = cursor  # behind the sample that was read last
        self._samples = self._endless(cursor)

    def read_into(self, out: NDArray[np.uint8]) -> tuple[int, int]:
        """(label, id) of the next sample, whose pixels are in `out`."""
        size = self.shape.image_size
        while True:
            sample, number, row = next(self._samples)
            try:
                label = self._label(sample)
                name = next((name for name in sample if name.lower() in IMAGE_EXTENSIONS), None)
                if name is None:
                    fields = ", ".join(name for name in sample if not name.startswith("__"))
                    raise BadSampleError("no_image", f"has no image, its fields are {fields}")
                if not decode_into(sample[name], out):
                    at_least = size if self.crop.reduced_ok else None
                    out[...] = self.crop(decode(sample[name], self.shape.channels, at_least, self.max_pixels), size)
                return label, number << ROW_BITS | row
            except BadSampleError as err:
                message = f"shard {self.shards[number]}, sample {sample['__key__']!r}: {err}"
                if self.strict:
                    raise DataError(f"{message}; data.on_error=skip leaves such samples out and counts them") from None
                self.skipped.append(Skipped(number << ROW_BITS | row, err.cause, message, -1))
                if len(self.skipped) >= _HOPELESS:
                    raise DataError(f"{_HOPELESS} bad samples before a batch was full, the last: {message}") from None

    def _label(self, sample: dict[str, Any]) -> int:
        if self.shape.num_classes == 0:
            return -1
        content = next((sample[name] for name in sample if name.lower() == "cls"), None)
        if content is None:
            raise BadSampleError("missing_label", f"has no label, the model has {self.shape.num_classes} classes")
        try:
            label = parse_label(content, {})
        except ValueError as err:
            raise BadSampleError("malformed_label", str(err)) from None
        if not 0 <= label < self.shape.num_classes:
            raise BadSampleError("label_out_of_range", f"label {label} is outside 0..{self.shape.num_classes - 1}")
        return label

    def _shard_at(self, place: int) -> int:
        """Number of the shard at a place of the endless sequence."""
        epoch, inside = divmod(place, len(self.shards))
        if epoch not in self._orders:
            self._orders = {epoch: keyed.permutation(keyed.key(self.seed, "stream shards", epoch), len(self.shards))}
        return int(self._orders[epoch][inside])

    def _at(self, place: int, drawn: int) -> StreamCursor:
        return StreamCursor(self.rank, self.world_size, place, drawn)

    def _endless(self, start: StreamCursor) -> Iterator[tuple[dict[str, Any], int, int]]:
        """(sample, number of its shard, row in it), from `start` on."""
        place, known, empty = start.place, start.drawn, 0
        while True:
            number, drawn = self._shard_at(place), 0
            for item in self._mixed(place):
                drawn += 1
                if drawn > known:  # what was drawn before is read again, since only that gives the same mix
                    self.cursor = self._at(place, drawn)
                    yield item
            if drawn < known:
                raise DataError(
                    f"shard {self.shards[number]} gave {drawn} samples, and {known} of it when the loader's state was "
                    "saved: it cannot be resumed exactly; a loader with images_seen starts at the nearest shard"
                )

            # Empty shards are skipped, but a whole round of them would never end.
            empty = 0 if drawn else empty + 1
            if not drawn:
                log.warning("shard %s is empty", self.shards[number])
            if empty >= len(self.shards):
                raise DataError(
                    f"no sample in any of the last {empty} shards of the stream, e.g. {self.shards[number]}"
                )
            place, known = place + self.world_size, 0

    def _mixed(self, place: int) -> Iterator[tuple[dict[str, Any], int, int]]:
        """All samples of the shard at a place of the sequence, mixed within a buffer."""
        number = self._shard_at(place)
        mixer = random.Random(keyed.key(self.seed, "stream samples", place))  # noqa: S311 -- an order, no secret
        waiting: list[tuple[dict[str, Any], int, int]] = []
        row = -1
        for row, sample in enumerate(self._open(number)):
            waiting.append((sample, number, row))
            if len(waiting) > self.buffer:
                at = mixer.randrange(len(waiting))
                waiting[at], waiting[-1] = waiting[-1], waiting[at]
                yield waiting.pop()
        self.counts.learn(number, row + 1)
        mixer.shuffle(waiting)
        yield from waiting

    def _open(self, number: int) -> Iterator[dict[str, Any]]:
        def handler(err: Exception) -> bool:
            message = f"shard {self.shards[number]} is damaged or cannot be read: {str(err)[:300]}"
            if self.strict:
                raise DataError(f"{message}; data.on_error=skip continues with what was read of it") from None
            self.skipped.append(Skipped(number << ROW_BITS, "damaged_shard", message, -1))
            return True

        yield from samples_of(self.shards[number], handler)

    def _nearest(self, samples_seen: int) -> int:
        """The place in the sequence of the shard whose start is nearest to this rank's `samples_seen`."""
        if samples_seen == 0:
            return self.rank
        place, before = self.rank, 0
        while True:  # add up the shards' sizes; a first one that is not known is counted
            length = self.counts.of(self._shard_at(place))
            if length is None:
                length = self.counts.learn(self._shard_at(place), sum(1 for _ in self._open(self._shard_at(place))))
            if before + length > samples_seen or (length == 0 and place > 2 * len(self.shards) * self.world_size):
                break
            before += length
            place += self.world_size
        repeated, omitted = samples_seen - before, before + length - samples_seen
        if omitted < repeated:
            place += self.world_size
        if repeated:
            log.warning(
                "a stream resumes at the nearest shard, %s, so %d samples of rank %d %s. Data with an index resume exactly.",
                self.shards[self._shard_at(place)], min(repeated, omitted), self.rank,
                "are skipped" if omitted < repeated else "are repeated",
            )  # fmt: skip
        return place
