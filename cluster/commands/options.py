"""Options and output that the verbs of this room share."""

import argparse
from pathlib import Path
from typing import Any


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Options of everything that submits."""
    parser.add_argument("--profile", type=Path, metavar="FILE", help="the cluster's profile (docs/slurm.md)")
    parser.add_argument("--time", metavar="T", help="time limit instead of the profile's: 90, 1:30:00, 2-00:00:00")
    parser.add_argument("--partition", metavar="P", help="partition instead of the profile's")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script; needs no Slurm")


def profile_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the profile that the command line replaces."""
    return {name: value for name in ("time", "partition") if (value := getattr(args, name)) is not None}


def log(text: str) -> None:
    """Print a line at once: submitting may take a while."""
    print(text, flush=True)
