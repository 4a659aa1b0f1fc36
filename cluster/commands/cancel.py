"""`tarflow cancel`: have a run save and end, and its evaluation end."""

import argparse
from pathlib import Path

from tarflow.cluster.commands.options import say

EXAMPLE = """example:
  tarflow cancel runs/in64

The run saves first; `tarflow submit` with the same directory goes on from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--wait", type=float, default=300.0, metavar="S", help="seconds it may take to save (default 300)"
    )


def run(args: argparse.Namespace) -> int:
    from tarflow.cluster.cancel import cancel

    return cancel(args.run, args.wait, say)
