"""Write a source as WebDataset (or MDS) shards with an index: decoded once, cropped, shuffled so that classes mix.

Everything is written into `OUT.partial` and renamed at the end: an interrupted or failed run leaves no data set behind,
and the same command started again begins afresh. The result depends on the source, the options and the seed only.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS, MAX_SIDE
from tarflow.data_pipeline.images.crop import FIXED
from tarflow.data_pipeline.index.build import build_index, by_cause
from tarflow.data_pipeline.index.classes import CLASSES_FILE
from tarflow.data_pipeline.index.mds import write_mds
from tarflow.data_pipeline.layout.names import shown, storable
from tarflow.data_pipeline.prepare.card import write_cards
from tarflow.data_pipeline.prepare.encode import QUALITY, Encoding, encoded_images
from tarflow.data_pipeline.prepare.order import Mask, shuffled, split_masks
from tarflow.data_pipeline.prepare.source import ImageSource
from tarflow.files import replace_dir
from tarflow.image_size import Size, plain, sides
from tarflow.leases import locked

FORMATS = ("png", "jpeg", "webp")
_EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}
CONTAINERS = ("webdataset", "mds")
_SHARD_BYTES = 512 << 20
_MDS_SHARD_BYTES = 64 << 20  # streaming's own default: its readers fetch whole shards
_SHARD_SIZE = 10_000
_PROGRESS_EVERY = 64  # images
_EXAMPLES = 20  # messages about images left out that are kept
_LISTED = 12  # classes


@dataclass
class Options:
    """How to prepare. `container`: shards of `webdataset` (tars) or `mds` (mosaicml-streaming).

    `size`: in pixels (see `tarflow.image_size`). `crop`: the rule by which images get it (`images.crop`). `channels`: 1, 3, or
    0 for as many as the source has.

    `shard_size`: most samples in a tar (10,000; a tar also ends at 512 MiB, an MDS shard at 64 MiB). `format`: png and webp
    are lossless, jpeg has `quality` (95). `val_fraction`: share of every class that goes to OUT/val, the rest to OUT/train;
    0 = no split.
    `max_pixels`: of the largest image that is decoded (180 million).
    """

    size: Size
    format: str = "png"
    quality: int | None = None
    channels: int = 0
    shard_size: int | None = None
    seed: int = 0
    val_fraction: float = 0.0
    on_error: str = "strict"
    container: str = "webdataset"
    max_pixels: int | None = None
    crop: str = "centre"

    def encoding(self) -> Encoding:
        """How the images are encoded, with the defaults filled in."""
        quality, most = self.quality or QUALITY, self.max_pixels or MAX_PIXELS
        return Encoding(self.size, self.format, quality, self.channels, most, self.crop)

    def check(self) -> None:
        """Raise DataError for a value out of range, and for one that would have no effect."""
        for name, value, right in (
            ("--size", plain(self.size), all(1 <= side <= MAX_SIDE for side in sides(self.size))),
            ("--format", self.format, self.format in FORMATS),
            ("--quality", self.quality, self.quality is None or 1 <= self.quality <= 100),
            ("--channels", self.channels, self.channels in (0, 1, 3)),
            ("--shard-size", self.shard_size, self.shard_size is None or self.shard_size >= 1),
            ("--val-fraction", self.val_fraction, 0 <= self.val_fraction < 1),
            ("--max-pixels", self.max_pixels, self.max_pixels is None or self.max_pixels >= 1),
            ("--on-error", self.on_error, self.on_error in ("strict", "skip")),
            ("--crop", self.crop, self.crop in FIXED),
            ("--container", self.container, self.container in CONTAINERS),
        ):
            if not right:
                raise DataError(f"{name} cannot be {value!r}")
        if self.quality is not None and self.format != "jpeg":
            raise DataError(
                f"--quality {self.quality} is for --format jpeg, {self.format} is lossless: omit one of them"
            )
        if self.shard_size is not None and self.container == "mds":
            raise DataError(
                f"--shard-size {self.shard_size} counts the samples of a tar, MDS shards end at {_MDS_SHARD_BYTES >> 20} MiB: "
                "omit it, or write --container webdataset"
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
            out.append(f"{len(self.classes)} classes: {_listed(self.classes)}")
            gone = [name for label, name in enumerate(self.classes) if label not in self.kept]
            if gone:
                out.append(f"{len(gone)} classes without a single image: {_listed(gone)}")
        if self.enlarged:
            out.append(f"{self.enlarged} images are smaller than the size asked for and were enlarged")
        out += by_cause("ignored files", self.ignored) + by_cause("left out", self.skipped)
        return out + [f"left out: {example}" for example in self.examples]


def _listed(names: list[str]) -> str:
    return ", ".join(map(shown, names[:_LISTED])) + " ..." * (len(names) > _LISTED)


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
    _check(source, out, options)
    masks = split_masks(source, options.val_fraction, options.seed)
    if options.container == "mds":
        _check_labels_for_mds(source, masks)
    report = Report(classes=source.classes, ignored=+source.ignored)
    with partial_folder(out) as staging:
        order = shuffled(source, options.seed)
        done = 0
        for split, mask in masks.items():
            numbers = order[mask[order]]
            if len(numbers) == 0:
                raise DataError(f"the split {split!r} would be empty: {len(source)} images (--val-fraction)")
            writer = _SplitWriter(source, options, report, _offset(progress, done, len(source)) if progress else None)
            report.written[split] = writer.write(numbers, staging / split)
            if report.written[split] == 0:
                raise DataError(f"not one of {len(numbers)} images could be decoded, first: {report.examples[0]}")
            done += len(numbers)
        if options.container == "webdataset":
            write_cards(staging, [*report.written], _EXTENSIONS[options.format], source.classes)
        _write_note(staging / "prepare.json", source, options, report)
    return report


def _check(source: ImageSource, out: Path, options: Options) -> None:
    """Raise DataError for what cannot be prepared, before anything is written."""
    if len(source) == 0:
        raise DataError("the source holds no images")
    if not storable(out):
        raise DataError(f"the name of the folder to write, {shown(out)}, is not UTF-8: give another one")
    if options.max_pixels is not None and source.pixels:
        raise DataError(
            f"--max-pixels {options.max_pixels} bounds what is decoded, and the source holds pixels: omit it"
        )
    check_new(out)


def _check_labels_for_mds(source: ImageSource, masks: dict[str, Mask]) -> None:
    """Raise DataError for a split of which only some images have a label."""
    for name, mask in masks.items():
        labelled, count = int((source.labels[mask] >= 0).sum()), int(mask.sum())
        if 0 < labelled < count:
            of = f" of {name}" if name else ""
            raise DataError(
                f"{labelled} of {count} images{of} have a label, MDS columns hold one for all or none: write "
                "--container webdataset, or leave the labels out with --labels none"
            )


def _offset(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + done, total)


def _write_note(path: Path, source: ImageSource, options: Options, report: Report) -> None:
    """How the set was made, with the defaults filled in."""
    made = asdict(replace(options, quality=options.quality or QUALITY, shard_size=options.shard_size or _SHARD_SIZE))
    note = {"options": made, "written": report.written, "skipped": report.skipped, "source": source.notes}
    path.write_text(json.dumps(note, indent=1) + "\n")


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


class _SplitWriter:
    """Writes images of a source as shards with an index, and counts them in a report."""

    def __init__(
        self, source: ImageSource, options: Options, report: Report, progress: Callable[[int], None] | None
    ) -> None:
        self.source = source
        self.options = options
        self.report = report
        self.progress = progress or (lambda _: None)

    def write(self, numbers: NDArray[np.int64], folder: Path) -> int:
        """Write the images `numbers` in this order; returns how many were written."""
        source, options = self.source, self.options
        folder.mkdir(exist_ok=True)
        images = self._images(numbers)
        if options.container == "mds":
            written, shards = write_mds(folder, images, _MDS_SHARD_BYTES), [folder]
        else:
            size = options.shard_size or _SHARD_SIZE
            written, shards = _write_tars(folder, images, _EXTENSIONS[options.format], size)
        if source.classes is not None:
            names = json.dumps(source.classes, ensure_ascii=False)
            (folder / CLASSES_FILE).write_text(names + "\n", encoding="utf-8")
        self.progress(len(numbers))
        if written:
            height, width = sides(options.size)
            build_index(
                folder,
                shards,
                classes=source.classes,
                image_size=(width, height),
                crop=options.crop,
                origin=source.notes,
            )
        return written

    def _images(self, numbers: NDArray[np.int64]) -> Iterator[tuple[bytes, int]]:
        """(file bytes, label or -1) of the images that can be read; the others are counted or, in strict mode, raised."""
        report = self.report
        for done, (number, found) in enumerate(encoded_images(self.source, numbers, self.options.encoding())):
            if done % _PROGRESS_EVERY == _PROGRESS_EVERY - 1:
                self.progress(done + 1)
            if isinstance(found, BadSampleError):
                self._skip(number, found)
                continue
            image, enlarged = found
            label = int(self.source.labels[number])
            report.enlarged += enlarged
            report.kept.add(label)
            yield image, label

    def _skip(self, number: int, why: BadSampleError) -> None:
        message = f"{self.source.name(number)}: {why}"
        if self.options.on_error == "strict":
            raise DataError(f"{message}; --on-error skip leaves such images out and counts them")
        self.report.skipped[why.cause] += 1
        if len(self.report.examples) < _EXAMPLES:
            self.report.examples.append(message)


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
