"""`tarflow ema`: reconstruct an average of the weights of any width after training."""

import argparse
from pathlib import Path

from tarflow.trainer.checkpoint.choice import add_choice

EXAMPLE = """example:
  tarflow ema runs/demo --relative-std 0.075
  tarflow ema runs/imagenet64 --relative-std 0.12 --images 12_800_000 --out wide.safetensors
  tarflow sample wide.safetensors --out samples
  tarflow ema runs/imagenet64 --relative-std 0.12 --out wide/

Uses the averages in the checkpoints and snapshots of the run; ema.snapshot_every_images sets how many there are.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--relative-std",
        type=float,
        required=True,
        metavar="X",
        help="relative width of the average, as a fraction of the run",
    )
    add_choice(parser, "the newest that holds averages")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="FILE.safetensors, FILE.pth or FOLDER/ with a model card (default: a file in the run)",
    )


def run(args: argparse.Namespace) -> int:
    from tarflow.trainer.ema.posthoc import reconstruct
    from tarflow.trainer.run_dir import require_run

    out, folder = args.out and Path(args.out), bool(args.out) and args.out.endswith("/")
    path = reconstruct(require_run(args.run), args.relative_std, args.step, out, print, args.images, folder)
    print(f"wrote {path}")
    return 0
