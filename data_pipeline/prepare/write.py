"""Write a source as WebDataset (or MDS) shards with an index: decoded once, cut to a square, shuffled so that classes mix.

Everything is written into `OUT.partial` and renamed at the end: an interrupted or failed run leaves no data set behind,
and the same command started again begins afresh. The result depends on the source, the options and the seed only.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS, MAX_SIDE
from tarflow.data_pipeline.images.decode import decode, from_pixels
from tarflow.data_pipeline.images.transform import fit
from tarflow.data_pipeline.index.build import build_index, by_cause
from tarflow.data_pipeline.index.classes import CLASSES_FILE
from tarflow.data_pipeline.index.mds import write_mds
from tarflow.data_pipeline.layout.names import shown, storable
from tarflow.data_pipeline.prepare.card import write_cards
from tarflow.data_pipeline.prepare.encode import QUALITY, encode
from tarflow.data_pipeline.prepare.order import held_out, shuffled
from tarflow.data_pipeline.prepare.source import ImageSource
from tarflow.files import replace_dir
from tarflow.locks import locked

FORMATS = ("png", "jpeg", "webp")
_EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}
CONTAINERS = ("webdataset", "mds")
_SHARD_BYTES = 512 << 20
_MDS_SHARD_BYTES = 64 << 20  # streaming's own default: its readers fetch whole shards
_SHARD_SIZE = 10_000
_CHUNK = 256  # images in flight between the threads and the writer


@dataclass
class Options:
    """How to prepare. `container`: shards of `webdataset` (tars) or `mds` (mosaicml-streaming).

    `size`: side of the square in pixels. `channels`: 1, 3, or 0 for as many as the source has.

    `shard_size`: most samples in a tar (10,000; a tar also ends at 512 MiB, an MDS shard at 64 MiB). `format`: png and webp
    are lossless, jpeg has `quality` (95). `val_fraction`: share of every class that goes to OUT/val, the rest to OUT/train;
    0 = no split.
    `max_pixels`: of the largest image that is decoded (180 million).
    """

    size: int
    format: str = "png"
    quality: int | None = None
    channels: int = 0
    shard_size: int | None = None
    seed: int = 0
    val_fraction: float = 0.0
    on_error: str = "strict"
    container: str = "webdataset"
    max_pixels: int | None = None

    def check(self) -> None:
        """Raise DataError for a value out of range, and for one that would have no effect."""
        for name, value, right in (
            ("--size", self.size, 1 <= self.size <= MAX_SIDE),
            ("--format", self.format, self.format in FORMATS),
            ("--quality", self.quality, self.quality is None or 1 <= self.quality <= 100),
            ("--channels", self.channels, self.channels in (0, 1, 3)),
            ("--shard-size", self.shard_size, self.shard_size is None or self.shard_size >= 1),
            ("--val-fraction", self.val_fraction, 0 <= self.val_fraction < 1),
            ("--max-pixels", self.max_pixels, self.max_pixels is None or self.max_pixels >= 1),
            ("--on-error", self.on_error, self.on_error in ("strict", "skip")),
            ("--container", self.container, self.container in CONTAINERS),
        ):
            if not right:
                raise DataError(f"{name} cannot be {value!r}")
        if self.quality is not None and self.format != "jpeg":
            raise DataError(
                f"--quality {self.quality} is for --format jpeg, {self.format} is lossless: leave one of them away"
            )
        if self.shard_size is not None and self.container == "mds":
            raise DataError(
                f"--shard-size {self.shard_size} counts the samples of a tar, MDS shards end at {_MDS_SHARD_BYTES >> 20} MiB: "
                "leave it away, or write --container webdataset"
            )


@dataclass
class Report:
    """What was written: samples per split ('' without splits), what was left out by cause, with the first names."""

    written: dict[str, int] = field(default_factory=dict)
    classes: list[str] | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    enlarged: int = 0
    kept: set[int] = field(default_factory=set)  # labels of what was written

    def lines(self) -> list[str]:
        """The report as plain lines."""
        out = [f"{split or 'all'}: {count} samples" for split, count in self.written.items()]
        if self.classes:
            out.append(
                f"{len(self.classes)} classes: {', '.join(map(shown, self.classes[:12]))}"
                + " ..." * (len(self.classes) > 12)
            )
            gone = [name for label, name in enumerate(self.classes) if label not in self.kept]
            if gone:
                out.append(
                    f"{len(gone)} classes without a single image: {', '.join(map(shown, gone[:12]))}"
                    + " ..." * (len(gone) > 12)
                )
        if self.enlarged:
            out.append(f"{self.enlarged} images are smaller than the size asked for and were enlarged")
        out += by_cause("ignored files", self.ignored) + by_cause("left out", self.skipped)
        return out + [f"left out: {example}" for example in self.examples]


def prepare(
    source: ImageSource,
    out: Path,
    options: Options,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write `source` to the new folder `out`, its splits to folders of `out`; returns what was written.

    `progress(done, total)` is called now and then. Raises DataError: `out` not empty, a bad option or one that contradicts
    the splits of the source, in strict mode the first image that cannot be decoded.
    """
    options.check()
    if len(source) == 0:
        raise DataError("the source holds no images")
    if not storable(out):
        raise DataError(f"the name of the folder to write, {shown(out)}, is not UTF-8: give another one")
    if options.max_pixels is not None and source.pixels:
        raise DataError(
            f"--max-pixels {options.max_pixels} bounds what is decoded, and the source holds pixels: leave it away"
        )
    check_new(out)
    of_split = _splits(source, options)
    if options.container == "mds":
        for name, members in of_split.items():
            labelled, count = int((source.labels[members] >= 0).sum()), int(members.sum())
            if 0 < labelled < count:
                of = f" of {name}" if name else ""
                raise DataError(
                    f"{labelled} of {count} images{of} have a label, MDS columns hold one for all or none: write "
                    "--container webdataset, or leave the labels out with --labels none"
                )
    report = Report(classes=source.classes, ignored=+source.ignored)
    with partial_folder(out) as staging:
        order = shuffled(source, options.seed)
        splits = {name: order[members[order]] for name, members in of_split.items()}
        done = 0
        for split, numbers in splits.items():
            if len(numbers) == 0:
                raise DataError(f"the split {split!r} would be empty: {len(source)} images (--val-fraction)")
            told = _offset(progress, done, len(source)) if progress else None
            count = _write_split(source, numbers, staging / split, options, report, told)
            if count == 0:
                raise DataError(f"not one of {len(numbers)} images could be decoded, first: {report.examples[0]}")
            report.written[split] = count
            done += len(numbers)
        if options.container == "webdataset":
            write_cards(staging, [*report.written], _EXTENSIONS[options.format], source.classes)
        made = asdict(
            replace(options, quality=options.quality or QUALITY, shard_size=options.shard_size or _SHARD_SIZE)
        )
        note = {"options": made, "written": report.written, "skipped": report.skipped, "source": source.notes}
        (staging / "prepare.json").write_text(json.dumps(note, indent=1) + "\n")
    return report


def _splits(source: ImageSource, options: Options) -> dict[str, np.ndarray]:
    """Split -> bool [n], which images are in it; '' where there is one set. Found splits stay, `val_fraction` adds one."""
    found: dict[str, np.ndarray] = {}
    for name, numbers in source.splits.items():
        found[name] = np.zeros(len(source), dtype=bool)
        found[name][numbers] = True
    if not options.val_fraction:
        return found or {"": np.ones(len(source), dtype=bool)}
    if "val" in found or (found and "train" not in found):
        raise DataError(
            f"--val-fraction {options.val_fraction:g} splits a set, but the source has the splits {', '.join(found)} already: "
            "leave it away, or take one with --split"
        )
    rest = found.pop("train", np.ones(len(source), dtype=bool))
    numbers = np.flatnonzero(rest)
    val = np.zeros(len(source), dtype=bool)
    val[numbers] = held_out(source.labels[numbers], options.val_fraction, options.seed)
    return {"train": rest & ~val, "val": val, **found}


def _offset(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)


def check_new(out: Path) -> None:
    """Raise DataError where something stands in the way of a new folder `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty: name a new folder")


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A fresh folder `OUT.partial` that becomes OUT when the block ends without an error.

    Raises DataError when OUT is not empty or another process is writing it. A leftover of a killed run is removed.
    """
    check_new(out)
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(out.name + ".lock")) as mine:
        if not mine:
            raise DataError(f"another process is writing {out} at this moment")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            if out.exists():
                out.rmdir()
            replace_dir(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write_split(
    source: ImageSource,
    numbers: np.ndarray,
    folder: Path,
    options: Options,
    report: Report,
    progress: Callable[[int], None] | None,
) -> int:
    """Write the images `numbers` in this order as shards plus index; returns how many were written."""
    folder.mkdir(exist_ok=True)

    def images() -> Iterator[tuple[bytes, int]]:
        for done, (number, image) in enumerate(_encoded(source, numbers, options, report)):
            if progress and done % 64 == 63:
                progress(done + 1)
            if image is not None:
                report.kept.add(int(source.labels[number]))
                yield image, int(source.labels[number])

    if options.container == "mds":
        written, shards = write_mds(folder, images(), _MDS_SHARD_BYTES), [folder]
    else:
        size = options.shard_size or _SHARD_SIZE
        written, shards = _write_tars(folder, images(), _EXTENSIONS[options.format], size)
    if source.classes is not None:
        (folder / CLASSES_FILE).write_text(json.dumps(source.classes, ensure_ascii=False) + "\n", encoding="utf-8")
    if progress:
        progress(len(numbers))
    if written:
        size_of_all = (options.size, options.size)
        build_index(folder, shards, classes=source.classes, image_size=size_of_all, origin=source.notes)
    return written


def _write_tars(
    folder: Path, images: Iterator[tuple[bytes, int]], extension: str, shard_size: int
) -> tuple[int, list[Path]]:
    """(samples written, shards)."""
    import webdataset as wds  # pulls torch: only here, where it is used

    shards: list[Path] = []
    writer: wds.TarWriter | None = None
    in_shard = bytes_in_shard = written = 0
    try:
        for image, label in images:
            if writer is None or in_shard >= shard_size or bytes_in_shard >= _SHARD_BYTES:
                if writer is not None:
                    writer.close()
                shards.append(folder / f"shard-{len(shards):06d}.tar")
                # A fixed time stamp: the same source and seed give the same bytes.
                writer = wds.TarWriter(str(shards[-1]), mtime=0)
                in_shard = bytes_in_shard = 0
            sample: dict[str, object] = {"__key__": f"{written:08d}", extension: image}
            if label >= 0:
                sample["cls"] = str(label)
            bytes_in_shard += writer.write(sample)
            in_shard += 1
            written += 1
    finally:
        if writer is not None:
            writer.close()
    return written, shards


def _encoded(
    source: ImageSource, numbers: np.ndarray, options: Options, report: Report
) -> Iterator[tuple[int, bytes | None]]:
    """(number, file bytes) in order, encoded by threads (Pillow lets go of the interpreter lock); None = left out."""

    def work(number: int) -> tuple[bytes, bool] | BadSampleError:
        try:
            data = source.read(number)
        except BadSampleError as err:
            return err
        except OSError as err:
            return BadSampleError("unreadable", f"cannot read: {err.strerror}")
        try:
            if isinstance(data, bytes):
                pixels = decode(data, options.channels or 3, None, options.max_pixels or MAX_PIXELS)
            else:
                pixels = from_pixels(data, options.channels or (1 if data.shape[2] == 1 else 3))
        except BadSampleError as err:
            return err
        small = min(pixels.shape[:2]) < options.size
        return encode(fit(pixels, options.size), options.format, options.quality or QUALITY), small

    with ThreadPoolExecutor(max_workers=min(16, len(os.sched_getaffinity(0)))) as pool:
        for start in range(0, len(numbers), _CHUNK):
            chunk = numbers[start : start + _CHUNK].tolist()
            for number, result in zip(chunk, pool.map(work, chunk)):
                if isinstance(result, BadSampleError):
                    message = f"{source.name(number)}: {result}"
                    if options.on_error == "strict":
                        raise DataError(f"{message}; --on-error skip leaves such images out and counts them")
                    report.skipped[result.cause] += 1
                    if len(report.examples) < 20:
                        report.examples.append(message)
                    yield number, None
                else:
                    report.enlarged += result[1]
                    yield number, result[0]
