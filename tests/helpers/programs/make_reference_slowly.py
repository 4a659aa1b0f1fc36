"""DATA OUT THREADS: make a reference file from features that take their time, three images a chunk."""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from tarflow.evaluation.references import compute
from tarflow.evaluation.references import make as making
from tarflow.evaluation.references.make import ReferenceRequest, make_reference
from tests.helpers.features import NoSpatial


class SlowFeatures(NoSpatial):
    name, sha256, preprocessing, dim, num_classes = "slow", "f00d", "none", 4, 0

    def __init__(self, *_: object) -> None:
        self.warnings: list[str] = []

    def __call__(self, images: Tensor) -> Tensor:
        time.sleep(0.02)
        return images.float().flatten(1)[:, :4]


if __name__ == "__main__":
    compute.CHUNK = 3
    making.Features = SlowFeatures  # type: ignore[misc, assignment]
    data, out, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    make_reference(ReferenceRequest(data, 8, 1, 0, "slow", None, Path(out), "strict", "cpu"))
