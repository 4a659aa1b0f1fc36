"""The options of every command that takes one of a run's checkpoints."""

import argparse


def add_choice(parser: argparse.ArgumentParser, default: str = "the newest") -> None:
    """Add `--images` and `--step`, which `find` takes."""
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help=f"checkpoint at N images seen, as in its name (default: {default})",
    )
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this optimizer step")
