"""How long training is blocked by a save: synchronous and asynchronous, alternating in one run.

A model whose state (weights, two moments, two averages, float32) is 400 MB is saved again and again with the run's own
checkpoint manager; between the saves its weights change, as in training. The asynchronous save is waited for outside the
measured time, so both kinds meet an idle disk.
"""

import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.common import Bar, finish, parse_args
from benchmarks.data_images import scratch
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.config.schema import Config
from tarflow.trainer.ema.ema import EMA
from tarflow.trainer.parallel.choose import make_backend
from tarflow.trainer.parallel.world import World
from tarflow.trainer.run_dir import create_run
from tarflow.trainer.saving.manager import CheckpointManager
from tarflow.trainer.saving.storage import CheckpointStorage
from tarflow.trainer.tracking.logger import MetricLogger


def make_manager(folder: Any, quick: bool, storage: CheckpointStorage | None = None) -> tuple[CheckpointManager, int]:
    """A checkpoint manager over a fresh training state, and the state's bytes."""
    config = Config.model_validate(
        {
            "data": {"train": "unused"},
            "model": {"image_size": 32, "patch_size": 4, "in_channels": 3, "channels": 128 if quick else 320,
                      "num_blocks": 4, "layers_per_block": 4},
            "train": {"global_batch_size": 1, "max_images": 10**6, "param_dtype": "float32", "device": "cpu"},
            "log": {"tensorboard": False},
        }
    )  # fmt: skip
    create_run(folder / "run")
    world = World()
    backend = make_backend(config, torch.device("cpu"), world, plan_batch(1, 1, 1))
    ema = EMA(backend, config.ema.relative_stds)
    log = MetricLogger(folder / "run", (), 10**6)
    manager = CheckpointManager(config, folder / "run", backend, ema, world, log, storage)
    size = sum(t.numel() * t.element_size() for t in (backend.state() | ema.state()).values())
    return manager, size


def main() -> int:
    args = parse_args("Measure the stall of synchronous and asynchronous saves.")
    rounds = 3 if args.quick else 8
    times: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
    whole: list[float] = []
    with scratch() as folder:
        manager, size = make_manager(folder, args.quick)
        for number in range(2 * (rounds + 1)):  # the first pair allocates buffers and is not counted
            for tensor in manager.backend.locals().values():
                tensor.data.add_(1e-3)
            kind = "asynchronous" if number % 2 else "synchronous"
            began = time.monotonic()
            manager.save(number + 1, number + 1, last=kind == "synchronous")
            stall = time.monotonic() - began
            manager.collect(wait=True)
            if number >= 2:
                times[kind].append(stall)
                whole += [time.monotonic() - began] if number % 2 else []
            saved = find(manager.run_dir)
            assert saved.step == number + 1, "the save failed"
    sync, stall = (statistics.median(times[kind]) for kind in ("synchronous", "asynchronous"))
    rows = [
        (kind, len(values), statistics.median(values), min(values), max(values)) for kind, values in times.items()
    ] + [("asynchronous, until committed", len(whole), statistics.median(whole), min(whole), max(whole))]
    print(
        f"state: {size / 1e6:.0f} MB in {len(manager.backend.locals())} weights, two moments and two averages of each"
    )
    bars = [
        Bar(
            "stall / synchronous save", stall / sync, at_most=0.25, reason="only the copy to host memory is waited for"
        ),
    ]
    return finish(args, rows, ("save", "times", "median s", "least s", "most s"), bars)


if __name__ == "__main__":
    sys.exit(main())
