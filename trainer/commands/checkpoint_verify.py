"""`tarflow checkpoint verify`: is every committed checkpoint still what was committed?"""

import argparse
from pathlib import Path

from tarflow.trainer.checkpoint.choice import add_choice

EXAMPLE = """example:
  tarflow checkpoint verify runs/demo

Exit codes: 0 all sound, 1 a committed checkpoint is damaged.
"""
OK, DAMAGE = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    add_choice(parser, "all")


def run(args: argparse.Namespace) -> int:
    from tarflow.errors import UserError
    from tarflow.trainer.checkpoint.find import check_identity, find, scan_as
    from tarflow.trainer.checkpoint.marker import beside, damage
    from tarflow.trainer.checkpoint.pins import pinned
    from tarflow.trainer.run_dir import require_run, run_id

    bad, owner = 0, None
    require_run(args.run)
    try:
        check_identity(args.run)
        owner = run_id(args.run)
    except UserError as error:
        bad += 1
        print(f"DAMAGED: {error}")
    usable, refused = scan_as(args.run, owner)
    if args.step is not None or args.images is not None:
        usable, refused = [find(args.run, args.step, args.images)], {}
    for checkpoint in usable:
        with pinned(checkpoint, owner="verify"):  # so that the retention of a running training keeps it meanwhile
            problem, more = damage(checkpoint), beside(checkpoint)
        bad += problem is not None
        print(f"{checkpoint.name}: " + (f"DAMAGED: {problem}" if problem else
              f"sound: {len(checkpoint.info['files'])} files, {checkpoint.num_bytes:,} bytes")
              + (f"; not of the checkpoint: {', '.join(map(repr, more[:4]))}" if more else ""), flush=True)  # fmt: skip
    for path, reason in sorted(refused.items()):
        bad += reason.ours
        print(f"{path.name}: {'DAMAGED' if reason.ours else 'not used'}: {reason}")
    if not usable and not refused:
        print("no committed checkpoint")
    return DAMAGE if bad else OK
