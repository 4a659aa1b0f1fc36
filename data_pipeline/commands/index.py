"""`tarflow data index`: an index for existing shards."""

import argparse
import errno
import os
from pathlib import Path

from tarflow.data_pipeline.commands.options import check_processes, print_notes, print_written, progress_bar
from tarflow.files import check_writable

EXAMPLE = """example:
  tarflow data index sets/mine
  tarflow data index 'sets/mine/train-{0000..0127}.tar' --out sets/mine

Reads all shards once and writes OUT/index. Patterns may contain braces and wildcards. DIR may hold an MDS set
(index.json and .mds shards) instead of tars. Shards of several splits, by their names, are indexed one split at a
time: --split train --out sets/train.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Shards, and the rules by which samples are found in them."""
    parser.add_argument("shards", nargs="+", metavar="DIR|PATTERN", help="folder, tar files or patterns")
    parser.add_argument("--out", type=Path, help="folder that gets the index/ (the folder that holds all shards)")
    parser.add_argument("--classes", type=Path, help="JSON file with the list of class names, in label order")
    parser.add_argument(
        "--split", metavar="NAME", help="take the shards of one split (train, val, test) by their names, or all"
    )
    parser.add_argument("--image-field", help="field with the image where samples have several, e.g. input.png, or the "
                        "column of an MDS set (the only image)")  # fmt: skip
    parser.add_argument("--label-field", help="extension of the label members (cls), json:NAME for a value inside the "
                        ".json members, or the column of an MDS set (found by name)")  # fmt: skip
    parser.add_argument(
        "--measure", action="store_true", help="also store width and height: reads the beginning of every image"
    )
    parser.add_argument("--processes", type=int, help="processes that scan (one per core, one for small sets)")
    parser.add_argument("--on-error", choices=("strict", "skip"), default="strict",
                        help="strict stops at the first bad sample, skip leaves it out and counts it")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the index; prints what was found in the shards."""
    from tarflow.data_pipeline.index.build import build_index
    from tarflow.data_pipeline.index.classes import parse_classes

    check_processes(args.processes)
    shards, notes = _find(args.shards, args.split)
    print_notes(notes)
    root = args.out or _folder_of(args.shards, shards)
    _check_writable(root, asked=args.out is not None)
    with progress_bar("indexing") as progress:
        index, report = build_index(
            root, shards, on_error=args.on_error, label_field=args.label_field, progress=progress,
            measure=args.measure, processes=args.processes, image_field=args.image_field, origin=notes,
            classes=parse_classes(args.classes) if args.classes else None,
        )  # fmt: skip
    print_written([*report.lines(), f"fingerprint {index.fingerprint}"], root / "index")
    return 0


def _find(patterns: list[str], split: str | None) -> tuple[list[Path], list[str]]:
    """(the shards to index, notes); an MDS set is given as its folder."""
    from tarflow.data_pipeline.errors import DataError
    from tarflow.data_pipeline.index.mds import INDEX_FILE
    from tarflow.data_pipeline.index.patterns import find_shards, of_one_split

    if len(patterns) == 1 and (Path(patterns[0]) / INDEX_FILE).is_file():
        if split:
            raise DataError(f"--split {split} has no effect on an MDS set, which {patterns[0]} is: omit it")
        return [Path(patterns[0])], []
    found, notes = find_shards(patterns)
    shards, more = of_one_split(found, split)
    return shards, notes + more


def _folder_of(patterns: list[str], shards: list[Path]) -> Path:
    """Where the index goes by default: the folder that was named, else the one that holds all shards."""
    only = Path(patterns[0])
    if len(patterns) == 1 and only.is_dir():
        return only
    return Path(os.path.commonpath([path.parent for path in shards]))


def _check_writable(root: Path, asked: bool) -> None:
    """Raise before the scan where the index could not be written; `asked`: whether --out named the folder."""
    from tarflow.data_pipeline.errors import DataError

    if root.exists() and not root.is_dir():
        raise DataError(f"--out {root} is not a folder")
    try:
        check_writable(root)
    except OSError as err:
        if asked or err.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise DataError(f"cannot write the index into {root}: {err.strerror}; --out FOLDER puts it elsewhere") from None
