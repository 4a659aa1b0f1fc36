"""The verb `tarflow train`."""

import argparse
import os
from pathlib import Path

EXAMPLE = """example:
  tarflow train configs/demo.yaml --run runs/demo optim.lr=1e-3 train.max_images=100_000
  torchrun --nproc-per-node 8 -m tarflow train configs/demo.yaml --run-dir runs/demo parallel.backend=fsdp2

Run the same command again to go on from the newest committed checkpoint.
Exit codes: 0 finished, 75 stopped on request after saving (run it again), 1 failed, 2 wrong settings.
"""


def build_parser(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="configuration file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file"
    )
    # torchrun takes --run for one of its own flags, so it has a longer name too.
    parser.add_argument(
        "--run-dir", "--run", dest="run", type=Path, metavar="DIR", help="run directory (default: runs/NAME of the file)"
    )
    parser.add_argument("--init-from", type=Path, metavar="WEIGHTS", help="start a new run from a weights file")
    parser.add_argument("--accept-new-data", action="store_true", help="resume although data.train is another data set")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    parser.add_argument("--world-size", type=int, metavar="N", help="dry run for so many processes")


def run(args: argparse.Namespace) -> int:
    from trainer.config_io import config_text, load_config

    config = load_config(args.config, args.overrides)
    if os.environ.get("RANK", "0") == "0":
        print(config_text(config), flush=True)
    if args.dry_run:
        from trainer.plan import describe

        print(describe(config, args.world_size))
        return 0
    from trainer.loop import train

    run_dir = args.run or Path("runs") / args.config.stem
    return train(config, run_dir, init_from=args.init_from, accept_new_data=args.accept_new_data)
