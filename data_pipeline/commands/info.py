"""`tarflow data info`: what a data set holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tarflow.terminal import plain

if TYPE_CHECKING:
    from tarflow.data_pipeline.index.index import Index

EXAMPLE = """example:
  tarflow data info sets/mnist5k/train --sheet digits.png
"""
LISTED_CLASSES = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DATA, and the contact sheet."""
    parser.add_argument("data", metavar="DATA", help="folder or address of the data set")
    parser.add_argument("--allow-root", action="append", metavar="ADDRESS",
                        help="where shards may be besides the address DATA (as data.allow_roots; repeatable)")  # fmt: skip
    parser.add_argument("--sheet", type=Path, help="write a contact sheet to this PNG file")
    parser.add_argument("--count", type=int, help="images on the sheet (64)")
    parser.add_argument("--tile", type=int, help="pixels of each image on the sheet (64)")


def run(args: argparse.Namespace) -> int:
    """Print the facts of the set, and write the sheet if one is asked for."""
    from tarflow.data_pipeline.errors import DataError
    from tarflow.data_pipeline.storage.access import Access
    from tarflow.data_pipeline.storage.open_index import open_index

    for flag, value in (("--count", args.count), ("--tile", args.tile)):
        if value is not None and (args.sheet is None or value < 1):
            raise DataError(f"{flag} {value} is for the contact sheet, and at least 1: give --sheet FILE too")
    # Facts, then classes, then the sheet, which reads images.
    access = Access(allow_roots=tuple(args.allow_root or ()))
    index = open_index(args.data, access)
    sizes = index.shard_sizes
    print(f"{plain(index.root, 4096)} ({plain(index.form)} shards)")
    print(f"samples      {index.num_samples:,}")
    print(f"shards       {len(sizes):,} ({int(sizes.min())} to {int(sizes.max())} samples, "
          f"{index.shard_bytes.sum() / 2**20:,.1f} MiB)")  # fmt: skip
    print(f"image size   {'x'.join(map(str, index.image_size)) if index.image_size else 'not recorded'}")
    print(f"labels       {index.num_samples - index.unlabelled:,} with, {index.unlabelled:,} without")
    without = " (of an earlier version, without contents: `tarflow data index` makes one with)"
    print(f"fingerprint  {index.fingerprint}{'' if index.knows_content else without}")
    for line in index.meta.get("origin", []):
        print(f"  {plain(line, 1000)}")
    if index.num_classes:
        _print_classes(index, index.num_classes)
    if args.sheet:
        from PIL import Image

        from tarflow.data_pipeline.prepare.contact_sheet import contact_sheet
        from tarflow.files import write_atomic

        sheet = Image.fromarray(contact_sheet(index, args.count or 64, args.tile or 64, access))
        write_atomic(args.sheet, lambda temporary: sheet.save(temporary, "PNG"))
        print(f"contact sheet written to {args.sheet}")
    return 0


def _print_classes(index: Index, num_classes: int) -> None:
    """Print the number of samples of each class; labels outside the classes are not counted."""
    import numpy as np

    from tarflow.data_pipeline.index.index import NO_LABEL

    counts = np.zeros(num_classes, dtype=np.int64)
    for shard in range(len(index.shard_sizes)):
        labels = index.rows(shard).labels
        np.add.at(counts, labels[(labels != NO_LABEL) & (labels >= 0) & (labels < num_classes)], 1)
    print(f"classes      {num_classes}")
    for label in range(min(num_classes, LISTED_CLASSES)):
        print(f"  {label:5d}  {counts[label]:10,}  {plain(index.classes[label]) if index.classes else ''}".rstrip())
    if num_classes > LISTED_CLASSES:
        print(f"  ... and {num_classes - LISTED_CLASSES} more ({counts.min():,} to {counts.max():,} samples)")
