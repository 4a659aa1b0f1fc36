"""Memory per rank of the sharded backends against whole copies: every tensor alive after a backward pass, measured.

The bar: with four ranks, at most 0.3 of ddp's parameters, gradients and optimizer states (a quarter would be perfect; the
layer at work, buffers and uneven pieces come on top).
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from benchmarks.common import Bar, finish, parse_args
from benchmarks.golden import training_config
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import parameters
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.parallel.choose import make_backend
from tarflow.trainer.parallel.memory import rank_memory
from tarflow.trainer.parallel.world import process_group, world_from_env

VARIANTS: dict[str, dict[str, Any]] = {
    "ddp x4": {"backend": "ddp"},
    "fsdp2 x4": {"backend": "fsdp2"},
    "ZeRO-3 x4": {"backend": "deepspeed", "zero_stage": 3},
}
RANKS = 4


def shape(quick: bool) -> TarFlowConfig:
    channels = 128 if quick else 256
    return TarFlowConfig(
        image_size=16, patch_size=4, channels=channels, num_blocks=4, layers_per_block=4, num_classes=10
    )


def alive_bytes() -> int:
    """Bytes of the distinct storages of all tensors alive in this process."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            tensor = thing._local_tensor if isinstance(thing, DTensor) else thing
            for t in (tensor, tensor.grad if tensor.is_leaf else None, getattr(tensor, "ds_tensor", None)):
                if isinstance(t, torch.Tensor) and not isinstance(t, DTensor):
                    storage = t.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def worker(parallel: dict[str, Any], quick: bool, out: str) -> None:
    """One rank: bytes alive after two steps' backward passes."""
    torch.set_num_threads(1)
    world = world_from_env()
    config = training_config(shape(quick), train={"global_batch_size": 2 * RANKS}, parallel=parallel)
    with process_group(world, torch.device("cpu"), 120):
        before = alive_bytes()
        backend = make_backend(config, torch.device("cpu"), world, plan_batch(2 * RANKS, world.size, 2))
        x, y = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)
        backend.forward_backward(x, y, 1.0, True)
        backend.optimizer_step(1e-4)
        backend.forward_backward(x, y, 1.0, True)
        held = torch.tensor(float(alive_bytes() - before))
        torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MAX)
        backend.optimizer_step(1e-4)
    if world.first:
        estimate = rank_memory(config, world.size)
        Path(out).write_text(json.dumps({"held": float(held), "estimate": estimate.held}))


def measure(name: str, quick: bool, folder: Path) -> dict[str, float]:
    job = json.dumps({"parallel": VARIANTS[name], "quick": quick, "out": str(folder / "out.json")})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m"]
    environment = os.environ | {"TARFLOW_MEMORY_JOB": job, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "benchmarks.memory"], env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"{name}: exit {done.returncode}\n{done.stderr[-4000:]}")
    answer: dict[str, float] = json.loads((folder / "out.json").read_text())
    return answer


def main() -> int:
    job = os.environ.pop("TARFLOW_MEMORY_JOB", None)
    if job is not None:
        worker(**json.loads(job))
        return 0
    args = parse_args("Measure memory per rank.")
    with tempfile.TemporaryDirectory() as folder:
        results = {name: measure(name, args.quick, Path(folder)) for name in VARIANTS}
    whole = results["ddp x4"]["held"]
    n = parameters(shape(args.quick))
    rows = [
        (name, r["held"] / 2**20, r["held"] / n, r["held"] / whole, r["estimate"] / 2**20)
        for name, r in results.items()
    ]
    bars = [Bar(f"{name} / ddp", r["held"] / whole, at_most=0.3, reason="a quarter, and a little on top")
            for name, r in results.items() if name != "ddp x4"]  # fmt: skip
    header = ("variant", "MiB per rank, measured", "bytes per parameter", "of ddp", "MiB by the plan")
    return finish(args, rows, header, bars, packages=("torch", "deepspeed"))


if __name__ == "__main__":
    sys.exit(main())
