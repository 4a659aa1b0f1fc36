"""`tarflow data verify`: decode every sample and check it."""

import argparse
from pathlib import Path

from tarflow.data_pipeline.commands.options import add_max_pixels, check_processes, progress_bar
from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.files import write_json
from tarflow.terminal import message

EXAMPLE = """example:
  tarflow data verify sets/mine --report verify.json

Exit code 1 when a problem was found.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DATA, and the file for the findings."""
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    parser.add_argument("--report", type=Path, help="write the findings to this JSON file")
    add_max_pixels(parser)
    parser.add_argument("--processes", type=int, help="processes that check (one per core, one for small sets)")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if there is a problem."""
    from tarflow.data_pipeline.prepare.verify import verify
    from tarflow.data_pipeline.storage.open_index import open_index

    check_processes(args.processes)
    index = open_index(args.data)
    with progress_bar("verifying") as progress:
        report = verify(index, processes=args.processes, progress=progress, max_pixels=args.max_pixels or MAX_PIXELS)
    for line in report.lines():
        print(message(line))
    if args.report:
        write_json(args.report, report.as_dict())
    return 1 if report.problems else 0
