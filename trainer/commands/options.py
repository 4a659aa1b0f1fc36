"""Options of a start of a training that hold whoever starts its processes: `train` here, torchrun, or a job of Slurm."""

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
        "help": "with --init-from: keep what fits a model of other classes or another image size",
    },
    "--accept-new-data": {"action": "store_true", "help": "resume although data.train is another data set"},
}


def add_start_options(parser: argparse.ArgumentParser) -> None:
    for option, how in START_OPTIONS.items():
        parser.add_argument(option, **how)


def start_arguments(args: argparse.Namespace) -> list[str]:
    """The options that were given, as words of a command line; paths hold from any folder."""
    words: list[str] = []
    for option in START_OPTIONS:
        value = getattr(args, option.removeprefix("--").replace("-", "_"))
        if isinstance(value, Path):
            words += [option, str(value.absolute())]
        elif value is not None and value is not False:
            words += [option] if value is True else [option, str(value)]
    return words
