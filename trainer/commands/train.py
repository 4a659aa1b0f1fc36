"""`tarflow train`: train a model, here or as one rank of several; the same command resumes."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tarflow.trainer.commands.options import add_start_options, start_arguments

if TYPE_CHECKING:
    from tarflow.trainer.resilience.signals import StopRequest

EXAMPLE = """example:
  tarflow train configs/demo.yaml --run-dir runs/demo optim.lr=1e-3 train.max_images=100_000
  tarflow train configs/demo.yaml --run-dir runs/demo --ranks 8 --max-restarts 3 parallel.backend=fsdp2
  torchrun --nproc-per-node 8 -m tarflow train configs/demo.yaml --run-dir runs/demo parallel.backend=fsdp2

Run the same command again to resume from the newest committed checkpoint.
Exit codes: 0 finished, 75 stopped on request after saving (run it again), 76 no progress: restarts keep coming back to the
same checkpoint (look before running it again), 77 hung (the rank's log has the stacks), 1 failed, 2 wrong settings.
SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 save and stop a run; a second SIGINT exits at once. See docs/failures.md.
"""
OUTLIVES_ITS_READER = True  # training continues when nobody reads its output; the log has every line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="configuration file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file")
    parser.add_argument(
        "--run-dir",
        "--run",
        dest="run",
        type=Path,
        metavar="DIR",
        help="run directory (default: runs/NAME of the file); under torchrun write --run-dir: it refuses --run",
    )
    add_start_options(parser)
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="start N processes on this machine (instead of torchrun)"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        help="restart all processes when one is lost, at most N times (default 0)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and exit")
    parser.add_argument("--world-size", type=int, metavar="N", help="dry run for N processes")


def run(args: argparse.Namespace) -> int:
    from tarflow.trainer.resilience.signals import StopRequest

    with StopRequest() as stop:  # before torch is imported, which takes seconds: from here on a signal counts
        return _run(args, stop)


def _run(args: argparse.Namespace, stop: "StopRequest") -> int:
    from tarflow.trainer.config.files import config_text, load_config
    from tarflow.trainer.errors import TrainerError
    from tarflow.trainer.start.check import check_start

    config = load_config(args.config, args.overrides, own=True)
    run_dir = args.run or Path("runs") / args.config.stem
    if args.init_partial and args.init_from is None:
        raise TrainerError("--init-partial needs --init-from: it says how those weights are used")
    supervised = not args.dry_run and (args.ranks is not None or args.max_restarts is not None)
    if supervised:
        _check_supervision(args)
    if args.dry_run:
        from tarflow.trainer.plan import describe

        ranks = args.world_size or args.ranks or config.parallel.world_size or 1
        start = check_start(config, run_dir, ranks, args.init_from, args.init_partial)
        print("\n".join([config_text(config), describe(config, ranks), *start.lines()]))
        return 0
    if supervised:  # checked once here, before any rank is started; each rank checks again
        ranks = args.ranks or 1
        check_start(config, run_dir, ranks, args.init_from, args.init_partial)
        from tarflow.trainer.resilience.supervisor import supervise

        return supervise(rank_arguments(args, run_dir), ranks, run_dir, args.max_restarts or 0)
    from tarflow.trainer.train import train

    return train(
        config, run_dir, init_from=args.init_from, accept_new_data=args.accept_new_data, init_partial=args.init_partial,
        stop=stop,
    )  # fmt: skip


def _check_supervision(args: argparse.Namespace) -> None:
    """Refuse numbers out of range, and starting ranks from within a rank."""
    from tarflow.trainer.errors import TrainerError

    if args.ranks is not None and args.ranks < 1:
        raise TrainerError(f"--ranks {args.ranks} must be at least 1")
    if args.max_restarts is not None and args.max_restarts < 0:
        raise TrainerError(f"--max-restarts {args.max_restarts} must be at least 0")
    if "RANK" in os.environ:
        raise TrainerError(
            f"--ranks and --max-restarts start processes, but this process is a rank already (RANK={os.environ['RANK']}): "
            "omit them under torchrun and Slurm, or unset RANK and WORLD_SIZE"
        )


def rank_arguments(args: argparse.Namespace, run_dir: Path) -> list[str]:
    """The arguments of `tarflow train` for one rank of a supervised run."""
    return [str(args.config), "--run-dir", str(run_dir), *start_arguments(args), *args.overrides]
