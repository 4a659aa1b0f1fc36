"""`tarflow checkpoint prune`: remove checkpoints that the retention settings do not keep."""

import argparse
from pathlib import Path

EXAMPLE = """example:
  tarflow checkpoint prune runs/demo --keep-latest 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--keep-latest",
        type=int,
        metavar="N",
        help="number of newest checkpoints to keep, at least 2 (default: the run's checkpoint.keep_latest)",
    )
    parser.add_argument(
        "--keep-every-images",
        type=int,
        metavar="N",
        help="also keep the first one at or after each multiple of N images, 0 = none (default: the run's "
        "checkpoint.keep_every_images)",
    )
    parser.add_argument("--damaged", action="store_true", help="also remove damaged ones that a start has set aside")
    parser.add_argument("--aside", action="store_true", help="also remove those that `checkpoint rewind` has set aside")


def run(args: argparse.Namespace) -> int:
    from tarflow.trainer.checkpoint.find import check_identity, committed, scan, why_skipped
    from tarflow.trainer.checkpoint.marker import damage
    from tarflow.trainer.checkpoint.names import ASIDE, DAMAGED
    from tarflow.trainer.checkpoint.retention import apply_retention, remove_set_aside
    from tarflow.trainer.errors import TrainerError
    from tarflow.trainer.run_dir import load_run_config, writer_lock

    settings = load_run_config(args.run).checkpoint
    latest = settings.keep_latest if args.keep_latest is None else args.keep_latest
    every = settings.keep_every_images if args.keep_every_images is None else args.keep_every_images
    if latest != -1 and latest < 2:
        raise TrainerError(f"--keep-latest {latest} must be at least 2, or -1 to keep all")
    if every < 0:
        raise TrainerError(f"--keep-every-images {every} must be at least 0 (0 = keep none)")
    check_identity(args.run)
    with writer_lock(args.run):  # a running training applies its own retention
        kept = committed(args.run)[-latest:] if latest != -1 else []
        if kept and all(damage(c) for c in kept):  # what is removed could be the last intact one
            raise TrainerError(
                f"the newest {len(kept)} checkpoints of {args.run} are all damaged, nothing is removed; see `tarflow "
                "checkpoint verify`, or keep more with --keep-latest"
            )
        stuck: list[str] = []
        removed = apply_retention(args.run, latest, every, warn=stuck.append)
        for asked, ending in ((args.damaged, DAMAGED), (args.aside, ASIDE)):
            removed += remove_set_aside(args.run, ending, warn=stuck.append) if asked else []
    for text in why_skipped(scan(args.run)[1], "touched").values():
        print(text)
    for name in removed:
        print(f"removed {name}")
    print(f"{len(removed)} removed, {len(committed(args.run))} stay")
    if stuck:  # only a warning in a save, but an error where removal was the request
        raise TrainerError(f"RUN {args.run}: {'; '.join(stuck)}")
    return 0
