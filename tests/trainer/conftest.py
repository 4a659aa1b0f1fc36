"""A tiny labelled data set in indexed shards, a configuration that trains on it in seconds, and cheap real ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.data import prepared, spots
from tests.helpers.runs import write_config


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 grey 8 px images in 3 classes: bright spots whose place is the class, with some noise."""
    return prepared(tmp_path_factory.mktemp("tiny"), *spots(), shard_size=40)


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> Path:
    """A configuration file for the tiny set: 30 steps of 16 images."""
    return write_config(
        tmp_path / "tiny.yaml", tiny_data,
        train={"global_batch_size": 16, "max_images": 480, "noise_std": 0.1, "param_dtype": "bfloat16"},
        optim={"lr": 1e-3, "warmup_images": 32}, checkpoint={"every_images": 80}, log={"every_steps": 5},
    )  # fmt: skip


Start = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    """Start real ranks and wait for their end: see `benchmarks.fault_ranks.serve`. They print into RUN-output.txt."""
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fault_ranks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    sent, heard = server.stdin, server.stdout

    def ask(config: Path, run: Path, *overrides: str, **order: Any) -> dict[str, Any]:
        whole = order | {"config": str(config), "run": str(run), "overrides": overrides}
        sent.write(json.dumps(whole) + "\n")
        sent.flush()
        answer = heard.readline()
        assert answer, "the server of ranks is gone"
        return dict(json.loads(answer))

    yield ask
    sent.close()
    server.wait(10)
