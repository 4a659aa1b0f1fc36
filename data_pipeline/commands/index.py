"""`tarflow data index`: an index for shards that are there."""

import argparse
import errno
import os
from pathlib import Path

from tarflow.data_pipeline.commands.options import check_processes, print_notes, print_written, progress_bar
from tarflow.files import check_writable

EXAMPLE = """example:
  tarflow data index sets/mine
  tarflow data index 'sets/mine/train-{0000..0127}.tar' --out sets/mine

Reads the headers of all shards once and writes OUT/index. Patterns may hold braces and wildcards. DIR may hold an MDS set
(index.json and .mds shards) instead of tars. Shards of several splits, as told by their names, are indexed one split at a time:
--split train --out sets/train.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", metavar="DIR|PATTERN", help="folder, tar files or patterns")
    parser.add_argument("--out", type=Path, help="folder that gets the index/ (the folder that holds all shards)")
    parser.add_argument("--classes", type=Path, help="JSON file with the list of class names, in label order")
    parser.add_argument(
        "--split", metavar="NAME", help="take the shards of one split (train, val, test) by their names, or all"
    )
    parser.add_argument("--image-field", help="field that holds the image where samples have several, e.g. input.png, or the "
                        "column of an MDS set (the only image)")  # fmt: skip
    parser.add_argument("--label-field", help="extension of the label members (cls), json:NAME for a value inside the "
                        ".json members, or the column of an MDS set (found by name)")  # fmt: skip
    parser.add_argument(
        "--measure", action="store_true", help="store width and height too: reads the head of every image"
    )
    parser.add_argument("--processes", type=int, help="processes that scan (one per core, one for small sets)")
    parser.add_argument("--on-error", choices=("strict", "skip"), default="strict",
                        help="strict stops at the first odd sample, skip leaves it out and counts it")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from tarflow.data_pipeline.errors import DataError
    from tarflow.data_pipeline.index.build import build_index
    from tarflow.data_pipeline.index.classes import parse_classes
    from tarflow.data_pipeline.index.mds import INDEX_FILE
    from tarflow.data_pipeline.index.patterns import find_shards, of_one_split

    check_processes(args.processes)
    notes: list[str] = []
    if len(args.shards) == 1 and (Path(args.shards[0]) / INDEX_FILE).is_file():
        shards = [Path(args.shards[0])]
        if args.split:
            raise DataError(
                f"--split {args.split} has no meaning for an MDS set, which {args.shards[0]} is: leave it away"
            )
    else:
        shards, notes = find_shards(args.shards)
        shards, more = of_one_split(shards, args.split)
        notes += more
    print_notes(notes)
    root = args.out
    if root is None:
        only = Path(args.shards[0])
        root = only if len(args.shards) == 1 and only.is_dir() else Path(os.path.commonpath([p.parent for p in shards]))
    if root.exists() and not root.is_dir():
        raise DataError(f"--out {root} is not a folder")
    try:
        check_writable(root)
    except OSError as err:
        if args.out is not None or err.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise DataError(f"cannot write the index into {root}: {err.strerror}; --out FOLDER puts it elsewhere") from None
    with progress_bar("indexing") as progress:
        index, report = build_index(
            root, shards, on_error=args.on_error, label_field=args.label_field, progress=progress,
            measure=args.measure, processes=args.processes, image_field=args.image_field, origin=notes,
            classes=parse_classes(args.classes) if args.classes else None,
        )  # fmt: skip
    print_written([*report.lines(), f"fingerprint {index.fingerprint}"], root / "index")
    return 0
