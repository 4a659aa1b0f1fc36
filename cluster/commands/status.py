"""`tarflow status`: the table of runs."""

import argparse
from pathlib import Path

EXAMPLE = """example:
  tarflow status runs/in64 runs/seeds --watch
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="runs or folders of runs (default: runs)")
    parser.add_argument("--watch", action="store_true", help="refresh the table until interrupted")
    parser.add_argument("--every", type=float, default=10.0, metavar="S", help="seconds between refreshes (default 10)")


def run(args: argparse.Namespace) -> int:
    """Print the table, once or until interrupted."""
    from tarflow.cluster.status import show

    return show(args.runs or [Path("runs")], args.every if args.watch else None)
