"""`tarflow report`: write a run's report.html."""

import argparse
from pathlib import Path

from tarflow.evaluation.commands.options import OK, say

EXAMPLE = """example:
  tarflow report runs/demo

Writes one page that needs nothing but itself: RUN/report.html.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: RUN/report.html)")


def run(args: argparse.Namespace) -> int:
    from tarflow.evaluation.report.build import write_report
    from tarflow.terminal import plain

    say(plain(f"report: {write_report(args.run, args.out, say)}", 4096))
    return OK
