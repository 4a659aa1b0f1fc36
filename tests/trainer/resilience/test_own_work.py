"""A slow rank is told from those that wait for it, by what its device does and not by what its host thread does."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tarflow.models.flow import FlowBlock
from tarflow.trainer.config.files import load_config
from tarflow.trainer.resilience.alive import read_heartbeats
from tarflow.trainer.resilience.exit_codes import FINISHED
from tarflow.trainer.resilience.own_work import OwnWork
from tarflow.trainer.resilience.watchdog import straggler
from tarflow.trainer.train import train
from tests.helpers.ranks import launch_ranks


class Device:
    """A device that is behind its host: marks are reached when the test says so."""

    def __init__(self) -> None:
        self.issued, self.reached = 0.0, 0.0

    def mark(self) -> Any:
        device, at = self, self.issued

        class Mark:
            milliseconds = 1e3 * at

            def query(self) -> bool:
                return device.reached >= at

            def elapsed_time(self, end: Any) -> float:
                assert end.query(), "a host that asks for this waits"
                return float(end.milliseconds - self.milliseconds)

        return Mark()


class Block(nn.Module):
    def __init__(self, device: Device, seconds: float) -> None:
        super().__init__()
        self.device, self.seconds = device, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.device.issued += self.seconds
        return x


def test_times_of_the_device_come_when_it_is_done_and_nobody_waits() -> None:
    device = Device()
    blocks = [Block(device, 0.5), Block(device, 0.25)]
    work = OwnWork(blocks, torch.device("cuda"), device.mark)
    x = torch.zeros(1)
    for _ in range(2):  # two steps of two micro-batches each; between blocks the stream waits for other ranks
        for _ in range(2):
            for block in blocks:
                block(x)
                device.issued += 10
        known = work.step_done(0.125)
        assert known == []
    device.reached = 40.0
    assert work.step_done(0) == [0.125 + 1.5]
    device.reached = 1000.0
    assert work.step_done(0.5) == [0.125 + 1.5, 0, 0.5]


def test_a_block_that_fails_is_not_counted() -> None:
    work = OwnWork([block := nn.Linear(2, 2)], torch.device("cpu"))
    with pytest.raises(RuntimeError):
        block(torch.zeros(3))
    assert work.step_done(0.25) == [0.25]


def trained_beside_a_slow_rank(config: Path, run: Path, backend: str, slow: int) -> int:
    """A rank of two, of which one's blocks take longer without its host thread being busy."""
    if int(os.environ["RANK"]) == slow:
        real = FlowBlock.forward

        def slowly(self: FlowBlock, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.05)
            return real(self, *args, **kwargs)

        FlowBlock.forward = slowly  # type: ignore[method-assign]
    settings = (f"parallel.backend={backend}", "train.max_images=480", "parallel.step_timeout_s=2", "checkpoint.every_images=0",
                "parallel.start_timeout_s=60", "log.tensorboard=false")  # fmt: skip
    return train(load_config(config, settings), run)


@pytest.mark.parametrize(("backend", "slow"), [("ddp", 1), ("fsdp2", 0)])
def test_a_rank_whose_device_is_slow_is_named(tiny_config: Path, tmp_path: Path, backend: str, slow: int) -> None:
    run = tmp_path / "run"
    assert launch_ranks(trained_beside_a_slow_rank, 2, tiny_config, run, backend, slow).values == [FINISHED] * 2
    named = straggler(read_heartbeats(run))
    assert named is not None
    assert named[0] == slow
    log = (run / "log.txt").read_text()
    assert f"straggler: rank {slow} needs 0." in log
    assert f"straggler: rank {1 - slow}" not in log


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_slow_is_timed_on_the_device() -> None:
    """Its host has launched everything long before, and is never stopped for the times."""

    class Busy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.cuda._sleep(20_000_000)  # device cycles: some hundredths of a second
            return x

    device = torch.device("cuda")
    work = OwnWork([block := Busy()], device)
    x = torch.zeros(1, device=device)
    block(x)
    torch.cuda.synchronize()
    work.step_done(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        began = time.perf_counter()
        for _ in range(5):
            block(x)
        launched = time.perf_counter() - began
        known = work.step_done(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert (known + work.step_done(0))[0] > 2 * launched
