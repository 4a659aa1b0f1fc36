"""`tarflow data info`: what a data set holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tarflow.image_size import shown
from tarflow.terminal import plain

if TYPE_CHECKING:
    from tarflow.data_pipeline.index.index import Index
    from tarflow.data_pipeline.loading.custom.dataset import CustomDataset
    from tarflow.data_pipeline.storage.access import Access

EXAMPLE = """example:
  tarflow data info sets/mnist5k/train --sheet digits.png
  tarflow data info photos/train --dataset mydata.py:Photos --sheet photos.png
"""
LISTED_CLASSES = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DATA, and the contact sheet."""
    parser.add_argument("data", metavar="DATA", help="folder or address of the data set")
    parser.add_argument("--dataset", metavar="FUNCTION",
                        help="module:function or FILE.py:function that is called with DATA (as data.dataset)")  # fmt: skip
    parser.add_argument("--allow-root", action="append", metavar="ADDRESS",
                        help="where shards may be besides the address DATA (as data.allow_roots; repeatable)")  # fmt: skip
    parser.add_argument("--sheet", type=Path, help="write a contact sheet to this PNG file")
    parser.add_argument("--count", type=int, help="images on the sheet (64)")
    parser.add_argument("--tile", type=int, help="pixels of each image on the sheet (64)")


def run(args: argparse.Namespace) -> int:
    """Print the facts of the set, and write the sheet if one is asked for."""
    from tarflow.data_pipeline.errors import DataError
    from tarflow.data_pipeline.storage.access import Access

    for flag, value in (("--count", args.count), ("--tile", args.tile)):
        if value is not None and (args.sheet is None or value < 1):
            raise DataError(f"{flag} {value} is for the contact sheet, and at least 1: give --sheet FILE too")
    if args.dataset is not None and args.allow_root:
        raise DataError("--allow-root is about shards behind an address, which --dataset replaces: give one of the two")
    # Facts, then classes, then the sheet, which reads images.
    access = Access(allow_roots=tuple(args.allow_root or ()))
    data = _of_shards(args.data, access) if args.dataset is None else _of_function(args.dataset, args.data)
    if args.sheet:
        from PIL import Image

        from tarflow.data_pipeline.prepare.contact_sheet import contact_sheet
        from tarflow.files import write_atomic

        sheet = Image.fromarray(contact_sheet(data, args.count or 64, args.tile or 64, access))
        write_atomic(args.sheet, lambda temporary: sheet.save(temporary, "PNG"))
        print(f"contact sheet written to {args.sheet}")
    return 0


def _of_shards(place: str, access: Access) -> Index:
    """Print what the index of a data set says."""
    from tarflow.data_pipeline.storage.open_index import open_index

    index = open_index(place, access)
    sizes = index.shard_sizes
    print(f"{plain(index.root, 4096)} ({plain(index.form)} shards)")
    print(f"samples      {index.num_samples:,}")
    print(f"shards       {len(sizes):,} ({int(sizes.min())} to {int(sizes.max())} samples, "
          f"{index.shard_bytes.sum() / 2**20:,.1f} MiB)")  # fmt: skip
    size = shown(index.image_size[::-1]) if index.image_size else "not recorded"
    print(f"image size   {size}" + (f", cropped by the rule {index.crop}" if index.crop else ""))
    print(f"labels       {index.num_samples - index.unlabelled:,} with, {index.unlabelled:,} without")
    without = " (of an earlier version, without contents: `tarflow data index` makes one with)"
    print(f"fingerprint  {index.fingerprint}{'' if index.knows_content else without}")
    for line in index.meta.get("origin", []):
        print(f"  {plain(line, 1000)}")
    if index.num_classes:
        _print_classes(index, index.num_classes)
    return index


def _of_function(name: str, place: str) -> CustomDataset:
    """Print what a look at a user's own data set shows."""
    from tarflow.data_pipeline.loading.settings import DataSettings
    from tarflow.data_pipeline.loading.survey import survey

    seen = survey(DataSettings.of(place, dataset=name))
    data = seen.facts.custom
    assert data is not None
    print(f"{plain(data.root, 4096)} of {plain(str(data.function.file), 4096)}")
    print(f"samples      {data.num_samples:,}")
    size = shown(seen.image_size[::-1]) if seen.image_size else f"several, shorter sides from {seen.sides[0]} px"
    print(f"image size   {size} in {len(seen.looks)} images looked at, {'RGB' if seen.channels == 3 else 'grey'}")
    print(f"labels       {len(seen.labels)} of these images with, {len(seen.looks) - len(seen.labels)} without")
    print(f"fingerprint  {data.fingerprint}")
    if data.classes:
        print(f"classes      {len(data.classes)}: {plain(', '.join(data.classes[:LISTED_CLASSES]), 4096)}")
    return data


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
