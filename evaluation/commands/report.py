"""`tarflow report`: write a run's report.html."""

import argparse
from pathlib import Path

from tarflow.evaluation.commands.options import OK, log

EXAMPLE = """example:
  tarflow report runs/demo

Writes one self-contained page: RUN/report.html.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments and options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: RUN/report.html)")


def run(args: argparse.Namespace) -> int:
    """Write the report."""
    from tarflow.evaluation.report.build import write_report
    from tarflow.terminal import plain

    log(plain(f"report: {write_report(args.run, args.out, log)}", 4096))
    return OK
