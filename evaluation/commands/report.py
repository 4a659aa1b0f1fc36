"""`tarflow report`: write a run's report.html."""

import argparse
from pathlib import Path

from tarflow.evaluation.commands.options import OK, say
from tarflow.files import listed

EXAMPLE = """example:
  tarflow report runs/demo

Writes one page that needs nothing but itself: RUN/report.html.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: RUN/report.html)")


def run(args: argparse.Namespace) -> int:
    from tarflow.evaluation.report.build import write_report

    report = write_report(args.run, args.out)
    # Results under other settings lie in directories with their hash behind the step.
    grids = listed(args.run / "evals", f"step-{'[0-9]' * 8}/grid.png")
    if grids:
        say(f"samples: {grids[-1]}")
    say(f"report: {report}")
    return OK
