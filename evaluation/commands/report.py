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
    from tarflow.evaluation.report.headline import find_headline
    from tarflow.evaluation.report.history import read_history
    from tarflow.evaluation.run_config import run_config

    report = write_report(args.run, args.out)
    headline = find_headline(read_history(args.run).results, run_config(args.run))
    if headline and (grid := headline.result.picture("grid.png")):
        say(f"samples: {grid}")
    say(f"report: {report}")
    return OK
