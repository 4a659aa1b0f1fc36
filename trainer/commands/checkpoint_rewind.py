"""`tarflow checkpoint rewind`: resume a run from an earlier checkpoint than its newest."""

import argparse
from pathlib import Path

from tarflow.trainer.checkpoint.choice import add_choice

EXAMPLE = """example:
  tarflow checkpoint rewind runs/demo --images 64000

Later checkpoints are set aside as NAME.aside, not removed: rename them back to undo the rewind; `tarflow checkpoint prune
--aside` removes them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    add_choice(parser, "none, give one")


def run(args: argparse.Namespace) -> int:
    from tarflow.trainer.checkpoint.find import find, is_newer, scan, why_skipped
    from tarflow.trainer.checkpoint.marker import require_whole
    from tarflow.trainer.checkpoint.names import ASIDE
    from tarflow.trainer.checkpoint.retention import set_aside
    from tarflow.trainer.errors import TrainerError
    from tarflow.trainer.run_dir import require_run, writer_lock

    require_run(args.run)
    if args.images is None and args.step is None:
        raise TrainerError(
            "give the checkpoint to go back to: --images N (`tarflow checkpoint list` shows what there is)"
        )
    with writer_lock(args.run):
        chosen = find(args.run, args.step, args.images)
        require_whole(chosen)
        for path, text in why_skipped(scan(args.run)[1], "used").items():
            if is_newer(path, chosen):
                print(text)
        for line in set_aside(args.run, chosen, ASIDE):
            print(line)
    print(f"the next `tarflow train` of {args.run} resumes from {chosen.name}")
    return 0
