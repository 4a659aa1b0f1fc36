"""Options, checks and output that the verbs of this room share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.terminal import message, styled

if TYPE_CHECKING:
    from tarflow.data_pipeline.prepare.write import Options
    from tarflow.image_size import Size


def add_writing(parser: argparse.ArgumentParser) -> None:
    """Add the options for how shards are written."""
    parser.add_argument("--format", choices=("png", "jpeg", "webp"), default="png", help="png, webp: lossless (png)")
    parser.add_argument("--quality", type=int, help="quality of --format jpeg (95)")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="grey or colour (as in the source)")
    parser.add_argument("--shard-size", type=int, help="maximum number of samples in a tar (10000)")
    parser.add_argument("--container", choices=("webdataset", "mds"), default="webdataset",
                        help="tar shards, or MDS shards of mosaicml-streaming (webdataset)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle and the split (0)")
    add_max_pixels(parser)
    parser.add_argument("--on-error", choices=("strict", "skip"), default="strict",
                        help="strict stops at the first damaged image, skip leaves it out and counts it")  # fmt: skip


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Add the bound on the images that are decoded."""
    parser.add_argument("--max-pixels", type=int, metavar="N",
                        help=f"maximum number of pixels of an image ({MAX_PIXELS})")  # fmt: skip


def writing_options(args: argparse.Namespace, size: Size, crop: str = "centre") -> Options:
    """The checked options that `add_writing` added, for images of `size` pixels by the rule `crop`."""
    from tarflow.data_pipeline.prepare.write import Options

    options = Options(
        size=size, format=args.format, quality=args.quality, channels=args.channels or 0, shard_size=args.shard_size,
        seed=args.seed, val_fraction=args.val_fraction or 0.0, on_error=args.on_error, container=args.container,
        max_pixels=args.max_pixels, crop=crop,
    )  # fmt: skip
    options.check()
    return options


def check_processes(processes: int | None) -> None:
    """Raise DataError for a --processes below 1."""
    from tarflow.data_pipeline.errors import DataError

    if processes is not None and processes < 1:
        raise DataError(f"--processes is {processes}, it must be at least 1")


def print_notes(notes: Iterable[str]) -> None:
    """Print what was inferred to stderr, before the work that depends on it."""
    for note in notes:
        print(message(f"note: {note}"), file=sys.stderr)


def print_written(lines: list[str], where: Path) -> None:
    """Print the lines of a report and the folder that was written."""
    from tarflow.data_pipeline.layout.names import shown

    for line in lines:
        print(message(line))
    print(f"written to {shown(where)}")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, nothing elsewhere; yields a function of (done, total)."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=styled(sys.stderr)), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
