"""`tarflow checkpoint list`: a table of a run's checkpoints."""

import argparse
import time
from pathlib import Path

EXAMPLE = """example:
  tarflow checkpoint list runs/demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")


def run(args: argparse.Namespace) -> int:
    from tarflow.errors import noted
    from tarflow.trainer.checkpoint.find import check_identity, scan_as, set_aside_dirs
    from tarflow.trainer.checkpoint.names import ASIDE, DAMAGED
    from tarflow.trainer.checkpoint.pins import pinned_names
    from tarflow.trainer.checkpoint.retention import permanent
    from tarflow.trainer.config.files import load_config
    from tarflow.trainer.run_dir import has_run_file, require_run, run_id

    if not has_run_file(args.run):
        require_run(args.run)
    owner, every, flaws = None, 0, list[str]()
    with noted(flaws):
        check_identity(args.run)
        owner = run_id(args.run)
    with noted(flaws):
        every = load_config(args.run / "config.yaml").checkpoint.keep_every_images
    for flaw in flaws:  # damage costs a line; everything else is listed
        print(flaw)
    usable, refused = scan_as(args.run, owner)
    pins, for_ever = pinned_names(args.run), permanent(usable, every)
    print("step        images seen        MB  saved                notes")
    for number, checkpoint in enumerate(usable, 1):
        notes = ["newest"] * (number == len(usable)) + ["pinned"] * (checkpoint.name in pins)
        notes += ["kept for ever"] * (checkpoint.name in for_ever)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((checkpoint.path / "COMMITTED").stat().st_mtime))
        print(f"{checkpoint.step:<10d}  {checkpoint.images_seen:>11,}  {checkpoint.num_bytes / 1e6:>8,.1f}  {when}  "
              + ", ".join(notes))  # fmt: skip
    for path, reason in sorted(refused.items()):
        print(f"{path.name}: not used: {reason}")
    for ending, why in ((DAMAGED, "set aside as damaged"), (ASIDE, "set aside by `checkpoint rewind`")):
        for path in set_aside_dirs(args.run, ending):
            print(f"{path.name}: {why}; `tarflow checkpoint prune --{ending[1:]}` removes it")
    if not usable:
        print("no committed checkpoint")
    return 0
