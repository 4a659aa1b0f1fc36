"""`tarflow report`: write a run's report.html, or one page that compares runs."""

import argparse
from pathlib import Path

from tarflow.evaluation.commands.options import OK, log

EXAMPLE = """example:
  tarflow report runs/demo
  tarflow report runs/a runs/b runs/c --out comparison.html

Writes one self-contained page: RUN/report.html; of several runs comparison.html in the current folder, with their curves over
each other, their headline results side by side, and the settings that differ.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments and options."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory; several are compared")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write it (default: RUN/report.html, or comparison.html)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the report."""
    from tarflow.evaluation.report.build import write_report
    from tarflow.evaluation.report.compare import write_comparison
    from tarflow.terminal import plain

    if len(args.runs) == 1:
        path = write_report(args.runs[0], args.out, log)
    else:
        path = write_comparison(args.runs, args.out or Path("comparison.html"), log)
    log(plain(f"report: {path}", 4096))
    return OK
