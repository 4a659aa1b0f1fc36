"""`tarflow report`: write a run's report.html."""

import argparse
from pathlib import Path

from tarflow.evaluation.commands.options import OK, say
from tarflow.files import listed
from tarflow.trainer.checkpoint.names import is_checkpoint_name

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
    # Results under other settings lie in directories with their hash behind the checkpoint's name.
    grids = [grid for grid in listed(args.run / "evals", "*/grid.png") if is_checkpoint_name(grid.parent.name)]
    if grids:
        newest = max(grids, key=lambda grid: (grid.parent.name.startswith("images-"), grid))
        say(f"samples: {newest}")
    say(f"report: {report}")
    return OK
