"""What only a GPU can show, in one command of some minutes: `python -m benchmarks.gpu [--only NAME ...] [--json FILE]`.

One rank, but through the sharded backend and NCCL, at the size of the ImageNet 64 preset. Each check prints a line of JSON as
soon as it is done, and none stops the others. `--tiny` goes the same ways on the CPU with a small model: it shows that the
program runs, and no figure.
"""

import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Bar, machine, parse_args
from benchmarks.golden import training_config
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import flops_per_image, peak_rate
from tarflow.models.denoise import denoise
from tarflow.models.flow import FlowBlock, TarFlow
from tarflow.models.likelihood import log_likelihood
from tarflow.models.presets import preset
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.sequential import invert_block, sample
from tarflow.models.sampling.settings import SamplingSettings
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.tensors import read_tensors
from tarflow.trainer.config.schema import CheckpointConfig, Config
from tarflow.trainer.ema.ema import EMA
from tarflow.trainer.metrics import MetricAccumulator
from tarflow.trainer.optimizer import GuardedAdamW
from tarflow.trainer.parallel.choose import compute_deterministically
from tarflow.trainer.parallel.memory import rank_memory
from tarflow.trainer.parallel.torch_backend import ShardedBackend
from tarflow.trainer.parallel.world import World
from tarflow.trainer.run_dir import create_run
from tarflow.trainer.saving.async_writer import AsyncWriter
from tarflow.trainer.saving.handle import Position, SaveHandle
from tarflow.trainer.saving.staging import Staging
from tarflow.trainer.step_inputs import StepInput

SMALL = TarFlowConfig(image_size=16, patch_size=4, channels=64, num_blocks=2, layers_per_block=2, num_classes=10)
Figures = dict[str, Any]


@dataclass
class Bench:
    """The device, the model that is measured on it, and the bars that the checks leave."""

    tiny: bool
    bars: list[Bar] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = torch.device("cpu" if self.tiny else "cuda:0")
        self.model = SMALL if self.tiny else preset("imagenet64-2-768-8-8")
        self.batch = 2 if self.tiny else 16

    def wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def peak_gb(self) -> float:
        return 0.0 if self.tiny else torch.cuda.max_memory_allocated() / 1e9

    def fresh(self) -> None:
        """Nothing of the check before is left in memory."""
        gc.collect()
        torch._dynamo.reset()
        if not self.tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def weights(self, shape: TarFlowConfig) -> TarFlow:
        """A model on the device, away from the identity."""
        torch.manual_seed(0)
        model = TarFlow(shape).to(self.device)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, 0, 0.01)
        return model.eval().requires_grad_(False)


class Steps:
    """Training steps of the sharded backend on random images, as the loop takes them."""

    def __init__(
        self, bench: Bench, mode: str = "none", compiled: bool = False, batch: int = 0, accumulation: int = 1,
        unit: int = 0,
    ) -> None:  # fmt: skip
        batch = batch or bench.batch
        images = batch * accumulation
        self.bench = bench
        self.config = training_config(
            bench.model,
            train={
                "global_batch_size": images, "micro_batch_size": batch, "max_images": 10**6,
                "param_dtype": "bfloat16", "grad_clip": 1.0, "skip_spikes": True,
            },
            parallel={"backend": "fsdp2", "layers_per_unit": unit}, activation_checkpoint={"mode": mode},
            compile={"enable": compiled},
        )  # fmt: skip
        self.backend = ShardedBackend(self.config, bench.device, World())
        self.ema = EMA(self.backend, self.config.ema.relative_stds)
        self.window = MetricAccumulator(bench.device)

    def take(self, number: int) -> None:
        """One optimizer step; its images, noise and labels depend on `number` alone."""
        train, device = self.config.train, self.bench.device
        parts = list(step_input(self.config, number, pin=not self.bench.tiny).micro_batches(
            train.micro_batch_size, train, device))  # fmt: skip
        stats = torch.zeros(3, device=device)
        for place, (images, labels, share) in enumerate(parts, 1):
            stats += self.backend.forward_backward(images, labels, share, place == len(parts))
        self.window.add(stats, self.backend.optimizer_step(1e-4))
        self.ema.update(10_000 + number, train.global_batch_size)

    def seconds(self, first: int, count: int) -> tuple[float, float]:
        """Seconds a step, and of those the host's, over `count` steps."""
        self.bench.wait()
        began, host = time.perf_counter(), 0.0
        for number in range(first, first + count):
            asked = time.perf_counter()
            self.take(number)
            host += time.perf_counter() - asked
        self.bench.wait()
        return (time.perf_counter() - began) / count, host / count


def step_input(config: Config, number: int, pin: bool = False) -> StepInput:
    """Random images of one global batch, drawn on the CPU."""
    generator = torch.Generator().manual_seed(number)
    n, shape = config.train.global_batch_size, config.model.image_shape
    pixels = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator)
    noise = torch.randn(n, *shape, generator=generator)
    labels = torch.randint(-1, config.model.num_classes, (n,), generator=generator)
    if pin:
        pixels, noise, labels = (t.pin_memory() for t in (pixels, noise, labels))
    places = torch.arange(n)
    return StepInput(pixels, noise, labels, 0, ids=places, slots=places)


def environment(bench: Bench) -> Figures:
    """Driver, torch, and the defaults that decide precision."""
    facts: Figures = {**machine(), "cuda": torch.version.cuda, "tf32": torch.backends.cuda.matmul.allow_tf32}
    if not bench.tiny:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        facts["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return facts


def denoise_memory(bench: Bench) -> Figures:
    """Bytes of the denoising step per image: layers computed twice, as it does, against layers kept. The same bits."""
    model, shape = bench.weights(bench.model), bench.model.image_shape
    used: dict[tuple[bool, int], float] = {}
    scores = {}
    for recompute in (False, True):
        for count in (2, 6):
            bench.fresh()
            torch.manual_seed(count)
            x = torch.randn(count, *shape, device=bench.device).clamp(-1, 1).requires_grad_()
            labels = torch.zeros(count, dtype=torch.long, device=bench.device)
            before = bench.peak_gb()
            (score,) = torch.autograd.grad(log_likelihood(model, x, labels, recompute=recompute).sum(), x)
            used[recompute, count] = bench.peak_gb() - before
            scores[recompute] = score
    apart = float((denoise(model, x.detach(), labels, 1.0) - x.detach() - scores[False]).abs().max())
    bench.bars.append(Bar("numbers of the score that differ", int((scores[True] != scores[False]).sum()), at_most=0))
    kept, twice = ((used[recompute, 6] - used[recompute, 2]) / 4 for recompute in (False, True))
    return {"GB per image, layers kept": kept, "GB per image": twice, "denoise apart": apart}


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
    if bench.tiny:
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
    whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t  # noqa: E731
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


def decoding(bench: Bench) -> Figures:
    """Seconds to sample a batch with guidance, from the time of one block; hours for 50,000 images."""
    model = bench.weights(bench.model).to(torch.bfloat16)
    model.var = model.var.float()
    config, figures, block = bench.model, {}, model.blocks[0]
    assert isinstance(block, FlowBlock)
    for count in (bench.batch,) if bench.tiny else (64, 256):
        bench.fresh()
        z = torch.randn(count, config.num_tokens, config.token_dim, device=bench.device)
        y = torch.zeros(count, dtype=torch.long, device=bench.device)
        with torch.inference_mode():
            bench.wait()
            began = time.perf_counter()
            invert_block(block, z, y, Guidance.of_block(SamplingSettings(guidance=2.3), 0, 1, z.shape[1]))
            bench.wait()
        seconds = (time.perf_counter() - began) * config.num_blocks
        hours = seconds * 50_000 / count / 3600
        figures[str(count)] = {"s a batch": seconds, "hours for 50,000": hours, "peak GB": bench.peak_gb()}
    return figures


def rate(bench: Bench) -> Figures:
    """Steps by checkpointing mode, compile and unit of sharding: time, share of the peak rate, memory over the cost model."""
    batch = bench.batch if bench.tiny else 32  # 16 leave the device waiting for the host
    figures: Figures = {}
    norms: dict[int, float] = {}  # of the second step's gradient, by images: every way computes the same
    for mode, compiled, unit, images in (
        ("selective", False, 0, batch), ("none", True, 1, batch), ("none", True, 2, batch), ("none", True, 4, batch),
        ("none", True, 0, batch), ("selective", True, 0, 2 * batch), ("full", True, 0, 2 * batch),
    ):  # fmt: skip
        bench.fresh()
        steps = Steps(bench, mode, compiled, images, unit=unit)
        began = time.perf_counter()
        steps.take(0)
        steps.take(1)
        bench.wait()
        first = time.perf_counter() - began
        norm = float(steps.backend.optimizer.grad_norm)
        expected = norms.setdefault(images, norm)
        seconds, host = steps.seconds(2, 6)
        model_gb = rank_memory(steps.config, 1).total / 1e9
        flops = flops_per_image(bench.model) * images
        peak = None if bench.tiny else peak_rate(torch.cuda.get_device_name())
        name = f"{mode}{', compiled' if compiled else ''}, {unit or 'all'} layers a unit, {images} images"
        figures[name] = {"ms": seconds * 1e3, "host ms": host * 1e3, "first two s": first, "peak GB": bench.peak_gb(),
                         "cost model GB": model_gb, "norm": norm, "MFU": flops / seconds / peak if peak else None}  # fmt: skip
        bench.bars.append(Bar(f"gradient norm, {name}", abs(norm / expected - 1), at_most=1e-2))
        if not bench.tiny:
            over = bench.peak_gb() / model_gb
            bench.bars += [Bar(f"peak over the cost model, {name}", over, at_most=1.1),
                           Bar(f"cost model over the peak, {name}", 1 / over, at_most=1.25)]  # fmt: skip
        if not compiled and not bench.tiny:
            with profile(activities=[ProfilerActivity.CUDA]) as record:
                steps.take(9)
                bench.wait()
            events = sorted(record.key_averages(), key=lambda event: -event.self_device_time_total)
            figures["kernels, ms"] = {e.key[:60]: e.self_device_time_total / 1e3 for e in events[:10]}
        del steps
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
        for place, part in enumerate(step_input(config, number).micro_batches(2, config.train, bench.device), 1):
            stats = backend.forward_backward(*part, place == 2)
        backend.optimizer_step(1e-4)
        losses.append(float(stats[0]))
    return {"losses": losses}


CHECKS: tuple[Callable[[Bench], Figures], ...] = (
    environment, denoise_memory, no_host_sync, save_is_a_snapshot, guarded_adamw, numbers, repeatable, zero, decoding, rate,
)  # fmt: skip


def main() -> int:
    names = [check.__name__ for check in CHECKS]
    args = parse_args("What only a GPU can show.", [
        ("--only", {"nargs": "+", "choices": names, "metavar": "NAME", "help": f"of {', '.join(names)}"}),
        ("--tiny", {"action": "store_true", "help": "a dry run on the CPU"}),
    ])  # fmt: skip
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(place)
    backend = "gloo" if args.tiny else "cpu:gloo,cuda:nccl"
    store = dist.TCPStore("127.0.0.1", 0, 1, True)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=120))
    bench, rows, failed = Bench(args.tiny), [], 0
    for check in CHECKS:
        if args.only and check.__name__ not in args.only:
            continue
        bench.fresh()
        began = time.perf_counter()
        try:
            figures = check(bench)
        except Exception as error:  # noqa: BLE001 - the other checks are worth having
            failed += 1
            figures = {
                "ERROR": f"{type(error).__name__}: {error}"[:300],
                "at": traceback.format_exc().splitlines()[-4:],
            }
        rows.append({"check": check.__name__, "seconds": round(time.perf_counter() - began, 1), **figures})
        print(json.dumps(rows[-1], default=str), flush=True)
    for bar in bench.bars:
        print(bar)
    if args.json:
        args.json.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    dist.destroy_process_group()
    return 1 if failed or (args.check and not all(bar.met for bar in bench.bars)) else 0


if __name__ == "__main__":
    sys.exit(main())
