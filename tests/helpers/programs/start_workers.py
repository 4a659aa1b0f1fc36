"""Starts two workers that are the program of a command line COMMAND... with the folder FOLDER; a test kills or signals it."""

import sys

import torch

import tarflow.cli
from tarflow.evaluation.start import processes

folder, *program = sys.argv[1:]


def command(module: str, *arguments: str, unbuffered: bool = False) -> list[str]:
    return [*program, folder, *arguments]


processes.module_command = command
torch.cuda.device_count = lambda: 2
sys.exit(tarflow.cli.main(["evaluate", "runs/a", "--workers", "2"]))
