"""COMMANDS (json): run verbs one after the other on a file system that lacks everything, and print their exit codes."""

import json
import sys

import pytest
import torch

import tarflow.cli
import tarflow.evaluation.worker.real_images
from tests.evaluation.conftest import FakeFeatures
from tests.helpers.poor_files import lack_everything

if __name__ == "__main__":
    lack_everything(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    tarflow.evaluation.worker.real_images.Features = FakeFeatures  # type: ignore[misc, assignment]
    for command in json.loads(sys.argv[1]):
        print("$", *command, flush=True)
        print("=", tarflow.cli.main(command), flush=True)
