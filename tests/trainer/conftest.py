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


def tiny_yaml(path: Path, data: Path) -> Path:
    """Write a configuration for the tiny set: 30 steps of 16 images."""
    return write_config(
        path, data,
        train={"global_batch_size": 16, "max_images": 480, "noise_std": 0.1, "param_dtype": "bfloat16"},
        optim={"lr": 1e-3, "warmup_images": 32}, checkpoint={"every_images": 80}, log={"every_steps": 5},
    )  # fmt: skip


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> Path:
    return tiny_yaml(tmp_path / "tiny.yaml", tiny_data)


class Start:
    """Start real ranks and wait for their end: see `benchmarks.fault_ranks`. They print into RUN-output.txt."""

    def __init__(self, server: "subprocess.Popen[str]") -> None:
        self.server = server

    def __call__(self, config: Path, run: Path, *overrides: str, **order: Any) -> dict[str, Any]:
        return self.soon(config, run, *overrides, **order)()

    def soon(self, config: Path, run: Path, *overrides: str, **order: Any) -> Callable[[], dict[str, Any]]:
        """Start them, and let them be until somebody calls what this returns, which waits for their end."""
        number = self.ask(order | {"config": str(config), "run": str(run), "overrides": overrides})
        return lambda: dict(self.ask({"end": number}))

    def ask(self, order: dict[str, Any]) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the server of ranks is gone"
        return json.loads(answer)


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fault_ranks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    yield Start(server)
    assert server.stdin is not None
    server.stdin.close()
    server.wait(10)
