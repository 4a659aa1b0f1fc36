"""`tarflow data prepare`: images to shards with an index."""

import argparse
from pathlib import Path

from tarflow.data_pipeline.commands.options import (
    add_writing,
    print_notes,
    print_written,
    progress_bar,
    writing_options,
)
from tarflow.image_size import size_option

EXAMPLE = """example:
  tarflow data prepare photos/ sets/photos --size 64 --val-fraction 0.1

SOURCE is a folder of images (class folders, train/ and val/ of class folders, dataset.json of EDM and StyleGAN), Parquet with
image bytes (a file, or a folder with train-*.parquet and so on), an .npz file with images and labels, IDX files, or the
official files of downsampled ImageNet (train_data_batch_1 ... and val_data in one folder). What is inferred is printed first;
docs/data.md has the table of layouts. Splits found by name become OUT/train, OUT/val and OUT/test. Images are cropped to the
shape of --size and resized, by the rule of --crop. OUT must be new or empty; it only appears when everything is written.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SOURCE and how it is read, OUT and how it is written."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of images, Parquet, .npz or IDX files")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--size", type=size_option, required=True, metavar="SIZE",
                        help="of the images, in pixels: a whole number for squares, HEIGHT,WIDTH for rectangles")  # fmt: skip
    parser.add_argument("--val-fraction", type=float, default=0.0,
                        help="share of every class held out: writes OUT/train and OUT/val (0)")  # fmt: skip
    parser.add_argument("--split", metavar="NAME[,NAME]",
                        help="splits to take of those found by name (train, val, test), or all as one set")  # fmt: skip
    parser.add_argument("--labels", choices=("dataset.json", "folders", "parents", "none"),
                        help="labels of a folder: its dataset.json, the folders directly in it, the folder each image is in, "
                        "or none (dataset.json if it is there, else folders)")  # fmt: skip
    parser.add_argument("--classes", type=Path,
                        help="JSON file with the class names in label order, e.g. another set's classes.json")  # fmt: skip
    parser.add_argument("--image-column", help="column or array with the images (found by name)")
    parser.add_argument("--label-column", help="column or array with the labels (found by name)")
    parser.add_argument("--crop", choices=("centre", "adm", "edm"), default="centre",
                        help="rule: the largest centred box, or the centre crop of ADM or of EDM (centre)")  # fmt: skip
    add_writing(parser)


def run(args: argparse.Namespace) -> int:
    """Write the set; prints what was inferred, then what was written."""
    from tarflow.data_pipeline.index.classes import parse_classes
    from tarflow.data_pipeline.prepare.sources import open_source
    from tarflow.data_pipeline.prepare.write import check_new, prepare

    options = writing_options(args, args.size, args.crop)
    check_new(args.out)  # before a source of a million files is looked through
    source = open_source(
        args.source, image_column=args.image_column, label_column=args.label_column, labels=args.labels, split=args.split,
        classes=parse_classes(args.classes) if args.classes else None,
    )  # fmt: skip
    print_notes(source.notes)
    with progress_bar("preparing") as progress:
        report = prepare(source, args.out, options, progress=progress)
    print_written(report.lines(), args.out)
    return 0
