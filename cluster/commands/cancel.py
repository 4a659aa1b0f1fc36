"""`tarflow cancel`: make a run save and stop, and stop its evaluation."""

import argparse
from pathlib import Path

from tarflow.cluster.commands.options import log

EXAMPLE = """example:
  tarflow cancel runs/in64

The run saves first; `tarflow submit` with the same directory goes on from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--wait", type=float, default=300.0, metavar="S", help="seconds to wait for the save (default 300)"
    )


def run(args: argparse.Namespace) -> int:
    """Cancel the run's jobs; the exit code is 1 if one could not save or was left alone."""
    from tarflow.cluster.cancel import cancel

    return cancel(args.run, args.wait, log)
