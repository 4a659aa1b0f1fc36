"""Options shared by everything that starts training processes: `tarflow train`, torchrun, a Slurm job."""

import argparse
from pathlib import Path
from typing import Any

START_OPTIONS: dict[str, dict[str, Any]] = {
    "--init-from": {
        "type": Path,
        "metavar": "WEIGHTS_OR_RUN",
        "help": "start a new run from a weights file, or from the newest average of another run",
    },
    "--init-partial": {
        "action": "store_true",
        "help": "with --init-from: keep the weights that fit, for other classes or another image size",
    },
    "--accept-new-data": {"action": "store_true", "help": "resume even though data.train is a different data set"},
}


def add_start_options(parser: argparse.ArgumentParser) -> None:
    for option, how in START_OPTIONS.items():
        parser.add_argument(option, **how)


def start_arguments(args: argparse.Namespace) -> list[str]:
    """The given options as command line arguments, with absolute paths."""
    words: list[str] = []
    for option in START_OPTIONS:
        value = getattr(args, option.removeprefix("--").replace("-", "_"))
        if isinstance(value, Path):
            words += [option, str(value.absolute())]
        elif value is not None and value is not False:
            words += [option] if value is True else [option, str(value)]
    return words
