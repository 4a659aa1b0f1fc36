"""Tars that can only be read from their beginning: pipes, object stores without ranges, anything `webdataset` opens.

There is no index, so nothing is known of a shard before it was read, and the promises are smaller, and said so:
- The endless sequence of shards is a pure function of the seed: epoch e holds every shard once, permuted by (seed, e).
  Rank r of W reads number r, r + W, r + 2W, ... of it, so another W gives other batches. No rank ever runs out.
- Samples are mixed within a buffer, and never across shards, keyed by (seed, number in the sequence).
- Resume goes to the nearest beginning of a shard: some samples come again, or are left out. Counts of the shards read so
  far are kept in the cache folder; where they are missing, a shard's length is taken from the others.
- A bad sample is an error, or left out and counted: the next one takes its place, so no rank's steps change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline import keyed
from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.images.decode import decode, decode_into
from tarflow.data_pipeline.images.formats import IMAGE_EXTENSIONS
from tarflow.data_pipeline.images.transform import fit
from tarflow.data_pipeline.index.content import sketch_of_file
from tarflow.data_pipeline.index.labels import parse_label
from tarflow.data_pipeline.index.patterns import expand_braces, find_shards
from tarflow.data_pipeline.layout.splits import by_split
from tarflow.data_pipeline.loading.sample_reader import Skipped
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tarflow.data_pipeline.loading.stream_tar import samples_of
from tarflow.data_pipeline.storage.access import address
from tarflow.data_pipeline.storage.cache_folder import make_cache_folder, write_own_file
from tarflow.data_pipeline.storage.roots import check_name
from tarflow.files import listed, open_regular
from tarflow.records import DamagedFileError, read_object, sealed

log = logging.getLogger("tarflow.data")

_HOPELESS = 10_000
_SKETCH_BLOCKS = 4  # of each shard, read by every rank at its start
ROW_BITS = 32  # the id of a sample: number of its shard << 32 | its row


def stream_shards(data: str | Path) -> list[str]:
    """What webdataset is to open: one entry per shard. Braces are expanded everywhere, wildcards in the file system."""
    text = str(data)
    if text.startswith("pipe:"):
        return expand_braces(text)
    url = address(data)
    if url:
        check_name(url)
        if any(mark in url for mark in "'\"`<> "):
            raise DataError(
                f"{url!r} is no address of tars: programs that open addresses would take marks in it for commands"
            )
        return expand_braces(url)
    shards, _ = find_shards(text)
    several = by_split(shards, Path(os.path.commonpath([path.parent for path in shards])))
    if len(several) > 1:
        told = ", ".join(split or "none" for split in several)
        raise DataError(
            f"the shards at {text} name several splits ({told}): name those of one, e.g. with a pattern, or index "
            "all as one set: tarflow data index --split all"
        )
    return [str(path) for path in shards]


def stream_fingerprint(shards: list[str]) -> str:
    """A digest of the names of the shards and, of those in the file system, of their sizes and some blocks.

    More is not known before they are read; of pipes and addresses it is the names alone.
    """
    with ThreadPoolExecutor(16) as pool:
        sketches = list(pool.map(_sketch, shards))
    if not any(sketches):
        return fingerprint_of_names(shards)
    return fingerprint_of_names([f"{name}\0{sketch}" for name, sketch in zip(shards, sketches)])


def fingerprint_of_names(names: list[str]) -> str:
    """The fingerprint of a stream as version 0.1 made it, of the shards' names."""
    return "stream-" + hashlib.sha256("\n".join(names).encode()).hexdigest()[:25]


def _sketch(shard: str) -> str:
    """Digest of a few blocks of a file; empty for what is none or cannot be read, which reading will tell."""
    try:
        fd = open_regular(shard)
    except OSError:
        return ""
    try:
        status = os.fstat(fd)
        return sketch_of_file(fd, status.st_size, _SKETCH_BLOCKS) if stat.S_ISREG(status.st_mode) else ""
    except OSError:
        return ""
    finally:
        os.close(fd)


class StreamSource:
    """The endless stream of one rank's samples, from the beginning of the shard nearest to its place.

    `read_into(out)` fills uint8 [size, size, channels] with the next good sample. `counts_folder`: where the counts of
    shards are kept. Raises DataError: no samples in a whole round of shards, in strict mode the first bad one.
    """

    def __init__(
        self, shards: list[str], shape: ImageShape, place: BatchShard, *, strict: bool, buffer: int, counts_folder: Path,
        max_pixels: int = MAX_PIXELS,
    ) -> None:  # fmt: skip
        self.shards = shards
        self.shape = shape
        self.strict = strict
        self.max_pixels = max_pixels
        self.seed, self.rank, self.world_size = place.seed, place.rank, place.world_size
        self.buffer = buffer
        self.counts = ShardCounts(counts_folder, shards, f"{place.rank}of{place.world_size}")
        self.skipped: list[Skipped] = []  # since the last look; `replacement` is -1
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._samples = self._endless(self._nearest(place.images_seen * place.share // place.global_batch_size))

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
                    out[...] = fit(decode(sample[name], self.shape.channels, size, self.max_pixels), size)
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

    def _endless(self, place: int) -> Iterator[tuple[dict[str, Any], int, int]]:
        empty = 0
        while True:
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
            empty = 0 if row >= 0 else empty + 1
            if row < 0:
                log.warning("shard %s is empty", self.shards[number])
            if empty >= len(self.shards):
                raise DataError(
                    f"no sample in any of the last {empty} shards of the stream, e.g. {self.shards[number]}"
                )
            place += self.world_size

    def _open(self, number: int) -> Iterator[dict[str, Any]]:
        def handler(err: Exception) -> bool:
            message = f"shard {self.shards[number]} is damaged or cannot be read: {str(err)[:300]}"
            if self.strict:
                raise DataError(f"{message}; data.on_error=skip goes on with what was read of it") from None
            self.skipped.append(Skipped(number << ROW_BITS, "damaged_shard", message, -1))
            return True

        yield from samples_of(self.shards[number], handler)

    def _nearest(self, samples_seen: int) -> int:
        """The place in the sequence to begin at."""
        if samples_seen == 0:
            return self.rank
        place, before = self.rank, 0
        while True:
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
                "a stream resumes at the nearest shard: %s, so %d samples of rank %d %s. Data with an index resume exactly.",
                self.shards[self._shard_at(place)], min(repeated, omitted), self.rank,
                "are left out" if omitted < repeated else "come again",
            )  # fmt: skip
        return place


class ShardCounts:
    """Samples in the shards read so far, kept in a small file per rank in the cache folder; all ranks' files are read.

    They decide nothing but at which shard a stream goes on: a damaged file is named, and made anew.
    """

    def __init__(self, folder: Path, shards: list[str], who: str) -> None:
        name = hashlib.sha256("\n".join(shards).encode()).hexdigest()[:24]
        self.path = folder / f"stream-{name}-{who}.json"
        self.counts: dict[int, int] = {}
        if not folder.exists():
            return
        for path in listed(make_cache_folder(folder), f"stream-{name}-*.json"):
            try:
                self.counts.update(_counts(read_object(path, way_out="it is made anew"), len(shards), path))
            except (OSError, DamagedFileError) as err:
                log.warning("%s", err)

    def of(self, shard: int) -> int | None:
        """Samples in a shard; where it is not known, the mean of the known ones; None where none is known."""
        if shard in self.counts or not self.counts:
            return self.counts.get(shard)
        return max(1, round(sum(self.counts.values()) / len(self.counts)))

    def learn(self, shard: int, count: int) -> int:
        """Remember a count; returns it. Raises DataError where the cache folder is not this user's."""
        if self.counts.get(shard) != count:
            self.counts[shard] = count
            plain = {str(number): samples for number, samples in self.counts.items()}
            try:
                write_own_file(make_cache_folder(self.path.parent), self.path.name, json.dumps(sealed(plain)).encode())
            except OSError as err:
                log.warning("cannot keep the counts of the shards in %s: %s", self.path, err)
        return count


def _counts(found: dict[str, Any], shards: int, path: Path) -> dict[int, int]:
    """The counts in a file of them. Raises DamagedFileError."""
    for shard, count in found.items():
        right = shard.isascii() and shard.isdigit() and len(shard) < 10 and int(shard) < shards
        if not right or type(count) is not int or not 0 <= count < 1 << 40:
            raise DamagedFileError(path, f"{str(count)[:40]} samples", "it is made anew", where=shard[:40])
    return {int(shard): count for shard, count in found.items()}
