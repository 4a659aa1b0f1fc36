"""`tarflow logs`: what a rank of a run's newest job has printed."""

import argparse
import sys
from pathlib import Path

from tarflow.terminal import message, plain_lines

EXAMPLE = """example:
  tarflow logs runs/in64 --rank 3

Of a log over 16 MiB only the end is shown. Terminal control sequences are shown as escapes; the files in RUN/slurm/jobs
hold the output as it was printed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="rank whose output to show (default 0)")
    parser.add_argument("--evaluation", action="store_true", help="show the evaluation's log instead of the training's")


def run(args: argparse.Namespace) -> int:
    """Print the log of one rank."""
    from tarflow.cluster.logs import log_text

    note, pieces = log_text(args.run, args.rank, "evaluate" if args.evaluation else "train")
    if note:
        print(message(f"note: {note}"), file=sys.stderr)
    for piece in pieces:
        sys.stdout.write(plain_lines(piece, len(piece)))  # a job prints text from its data
    return 0
