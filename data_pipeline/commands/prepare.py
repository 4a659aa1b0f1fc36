"""`tarflow data prepare`: images to shards with an index."""

import argparse
from pathlib import Path

from tarflow.data_pipeline.commands.options import add_writing, print_written, progress_bar, writing_options

EXAMPLE = """example:
  tarflow data prepare photos/ sets/photos --size 64 --val-fraction 0.1

SOURCE is a folder of class folders, a Parquet file with image bytes, an .npz file with images and labels, or an IDX file.
Images are cut to a centred square of --size pixels. OUT must be new or empty; it appears only when everything is written.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder, .parquet, .npz or IDX file")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--size", type=int, required=True, help="side of the square images, in pixels")
    parser.add_argument("--val-fraction", type=float, default=0.0,
                        help="share of every class held out: writes OUT/train and OUT/val (0)")  # fmt: skip
    parser.add_argument("--image-column", help="column or array with the images (found by name)")
    parser.add_argument("--label-column", help="column or array with the labels (found by name)")
    add_writing(parser)


def run(args: argparse.Namespace) -> int:
    from tarflow.data_pipeline.prepare.sources import open_source
    from tarflow.data_pipeline.prepare.write import prepare

    options = writing_options(args, args.size)
    source = open_source(args.source, image_column=args.image_column, label_column=args.label_column)
    with progress_bar("preparing") as progress:
        report = prepare(source, args.out, options, progress=progress)
    print_written(report.lines(), args.out)
    return 0
