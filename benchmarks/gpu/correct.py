"""That a GPU computes what a CPU computes, saves what it trains, and never waits for its host."""

import copy
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Bar, machine
from benchmarks.golden import training_config
from benchmarks.gpu.bench import SMALL, Bench, Figures, Steps, step_input
from tarflow.models.flow import TarFlow
from tarflow.models.sampling.sequential import sample
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.tensors import read_tensors
from tarflow.trainer.config.schema import CheckpointConfig
from tarflow.trainer.optimizer import GuardedAdamW
from tarflow.trainer.parallel.choose import compute_deterministically
from tarflow.trainer.parallel.saved import whole
from tarflow.trainer.parallel.world import World
from tarflow.trainer.run_dir import create_run
from tarflow.trainer.saving.async_writer import AsyncWriter
from tarflow.trainer.saving.handle import Position, SaveHandle
from tarflow.trainer.saving.staging import Staging


def environment(bench: Bench) -> Figures:
    """Driver, torch, and the defaults that decide precision."""
    facts: Figures = {**machine(), "cuda": torch.version.cuda, "tf32": torch.backends.cuda.matmul.allow_tf32}
    if bench.on_gpu("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        facts["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return facts


def no_host_sync(bench: Bench) -> Figures:
    """A step with accumulation, guard and metrics never waits for the device."""
    steps = Steps(bench, "selective", accumulation=2)
    steps.take(0)
    steps.take(1)
    bench.wait()
    with sync_is_an_error(bench):
        steps.take(2)
        pending = steps.window.close(steps.backend.skipped(), 1)
    return {"loss": pending.wait()["train/loss"]}


@contextmanager
def sync_is_an_error(bench: Bench) -> Iterator[None]:
    if not bench.on_gpu("set_sync_debug_mode"):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def save_is_a_snapshot(bench: Bench) -> Figures:
    """Training goes on during a save; what is committed is the state when it began."""
    steps = Steps(bench)
    steps.take(0)
    state = steps.backend.state() | steps.ema.state()
    wanted = {name: whole(t).cpu().clone() for name, t in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        create_run(run)
        staging, writer, save = Staging(), AsyncWriter(run, CheckpointConfig()), SaveHandle(Position(8, 1))
        began = time.perf_counter()
        staged = staging.copy(state)
        stall = time.perf_counter() - began
        writer.start(save, staged, lambda: ("{}", {}))
        taken = 1
        while not save.done:
            steps.take(taken)
            taken += 1
        save.wait()
        found = {name: torch.empty_like(t) for name, t in wanted.items()}
        read_tensors(find(run), found)
        began = time.perf_counter()
        staging.copy(state)
        again = time.perf_counter() - began
    differing = sum(not torch.equal(wanted[name], found[name]) for name in wanted)
    bench.bars.append(Bar("tensors of a save that differ from the state when it began", differing, at_most=0))
    return {"error": save.error, "steps meanwhile": taken - 1, "first stall s": stall, "later stall s": again,
            "save s": save.seconds, "GB": sum(t.nbytes for t in wanted.values()) / 1e9}  # fmt: skip


def guarded_adamw(bench: Bench) -> Figures:
    """Clipping, a gradient that is not finite and a spike: the same updates as on the CPU."""
    torch.manual_seed(0)
    weights = [torch.randn(300, 70), torch.randn(1000)]
    gradients = [[torch.randn_like(p) * (8 if k == 2 else 1) for p in weights] for k in range(4)]
    gradients[1][0][3, 3] = float("nan")
    ends: list[list[Tensor]] = []
    for device in (torch.device("cpu"), bench.device):
        parameters = [p.clone().to(device) for p in weights]
        optimizer = GuardedAdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=1e-2, grad_clip=1.0)
        for step in gradients:
            for p, gradient in zip(parameters, step):
                p.grad = gradient.to(device)
            optimizer.step()
        ends.append([p.cpu() for p in parameters] + [optimizer.skipped_steps.cpu()])
    apart = max(float((a - b).abs().max()) for a, b in zip(*ends))
    bench.bars.append(Bar("guarded AdamW against the CPU", apart, at_most=1e-5))
    return {"apart": apart, "skipped": float(ends[1][-1])}


def numbers(bench: Bench) -> Figures:
    """Forward pass against the CPU, the way back, and bfloat16 products."""
    model = TarFlow(SMALL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.eval().requires_grad_(False)
    x, y = torch.rand(8, *SMALL.image_shape, generator=generator) * 2 - 1, torch.arange(8)
    z, _ = model(x, y)
    there = copy.deepcopy(model).to(bench.device)
    zg, _ = there(x.to(bench.device), y.to(bench.device))
    low = copy.deepcopy(there).to(torch.bfloat16)
    low.var = there.var
    zb, _ = low(x.to(bench.device), y.to(bench.device))
    back = sample(there, zg, y.to(bench.device))
    apart, trip = float((zg.cpu() - z).abs().max()), float((back.cpu() - x).abs().max())
    bench.bars += [Bar("float32 against the CPU", apart, at_most=1e-4), Bar("round trip", trip, at_most=1e-4)]
    return {"float32 apart": apart, "round trip": trip, "bfloat16 apart": float((zb - zg).abs().max())}


def repeatable(bench: Bench) -> Figures:
    """The same four steps twice, with train.deterministic and with any kernels: weights that differ."""
    figures: Figures = {"CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")}
    last: dict[str, Tensor] = {}
    compute_deterministically(bench.device)
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        ends: list[dict[str, Tensor]] = []
        for _ in range(2):
            bench.fresh()
            steps = Steps(bench, "none", True)
            for number in range(4):
                steps.take(number)
            ends.append({name: t.detach().clone() for name, t in steps.backend.locals().items()})
            seconds, _ = steps.seconds(4, 4)
            del steps
        differing = sum(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
        figures["deterministic" if deterministic else "any kernels"] = {
            "tensors that differ": differing, "of": len(ends[0]), "ms": seconds * 1e3}  # fmt: skip
        if deterministic:
            bench.bars.append(Bar("tensors that differ after the same steps", differing, at_most=0))
            last = ends[0]
    apart = max(float((last[name] - ends[0][name]).abs().max()) for name in last)  # four steps of 1e-4 at most
    bench.bars.append(Bar("weights with deterministic kernels against any", apart, at_most=1e-4))
    return figures


def zero(bench: Bench) -> Figures:
    """DeepSpeed's ZeRO-3 takes steps."""
    from tarflow.trainer.parallel.zero import ZeroBackend

    config = training_config(
        SMALL,
        train={"global_batch_size": 4, "micro_batch_size": 2, "max_images": 10**6, "param_dtype": "bfloat16"},
        parallel={"backend": "deepspeed", "zero_stage": 3},
    )
    backend, losses = ZeroBackend(config, bench.device, World(), plan_batch(4, 1, 2)), []
    for number in range(3):
        for place, part in enumerate(step_input(config, number, 4).micro_batches(2, config.train, bench.device), 1):
            stats = backend.forward_backward(part.images, part.labels, part.share, place == 2)
        backend.optimizer_step(1e-4)
        losses.append(float(stats[0]))
    return {"losses": losses}
