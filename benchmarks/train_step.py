"""A training step of ours on the CPU against plain torch and against the published way of doing it.

Same model, same batch, one run, the three in turn; medians. Patch 4, width 256, 4 x 4 layers (2 x 2 at 4,096 tokens),
float32 and bfloat16. Bar: not slower than plain torch on any processor, whatever its products cost; how much faster than
the published way depends on the processor and is only shown. Also: this machine's matrix-product rate, measured in the
same run, the share of it that each step reaches, and where our time goes.
"""

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Bar, finish, parse_args
from benchmarks.golden import training_config
from benchmarks.plain_torch import PlainTrainer
from benchmarks.published_style import DenseTrainer
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import flops_per_image
from tarflow.models.flow import TarFlow
from tarflow.models.init import init_weights
from tarflow.trainer.parallel.torch_backend import SingleBackend

TOKENS = (256, 1024, 4096)
# Where both compute the same, medians of a few steps still differ by as much on a machine that does something else, too.
NOT_SLOWER = 0.97
LR = 1e-4
GROUPS = {
    "products": ("mm", "addmm"),
    "attention": ("_scaled_dot_product", "bmm", "baddbmm", "_softmax"),
    "optimizer": ("_fused_adamw", "_foreach"),
}


def shape(tokens: int) -> TarFlowConfig:
    depth = 2 if tokens == 4096 else 4
    return TarFlowConfig(
        image_size=round(tokens**0.5) * 4, patch_size=4, channels=256, num_blocks=depth, layers_per_block=depth,
        num_classes=10,
    )  # fmt: skip


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a 1,024^3 product on this machine, best of several."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


class Ours:
    """Our step, with its metrics read at the end of the window, as the loop does."""

    def __init__(self, config: TarFlowConfig, weights: dict[str, Tensor], dtype: str) -> None:
        model = TarFlow(config)
        model.load_state_dict(weights)
        settings = training_config(config, train={"param_dtype": dtype, "global_batch_size": 8})
        self.backend = SingleBackend(model, settings, torch.device("cpu"))

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        stats = self.backend.forward_backward(x, y, 1.0)
        self.backend.optimizer_step(LR)
        return stats


def compare(tokens: int, dtype: str, rounds: int) -> dict[str, float]:
    """Our speed over the others', from the medians of steps taken in turn; and how far the first losses are apart."""
    config = shape(tokens)
    model = TarFlow(config)
    init_weights(model, 0)
    weights = model.state_dict()
    batch = max(1, 4096 // tokens)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *config.image_shape, generator=generator)
    y = torch.arange(batch) % 10 - (torch.arange(batch) == 0).long()  # the first label is dropped
    published = DenseTrainer(config, weights, getattr(torch, dtype), LR)
    plain = PlainTrainer(config, weights, getattr(torch, dtype), LR)
    ours = Ours(config, weights, dtype)
    first = float(ours.step(x, y)[0])
    apart = max(abs(published.step(x, y)["loss"] - first), abs(plain.step(x, y) - first))
    steps: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "published": published.step, "plain": plain.step, "ours": ours.step
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % 3 :] + names[: turn % 3]:  # whoever comes after the dense masks pays for their memory
            wall, used = time.perf_counter(), time.process_time()
            steps[name](x, y)
            seconds[name].append(time.perf_counter() - wall)
            cpu[name].append(time.process_time() - used)
    wall_of = {name: median(times) for name, times in seconds.items()}
    cpu_of = {name: median(times) for name, times in cpu.items()}
    rate = matmul_rate(getattr(torch, dtype))
    achieved = flops_per_image(config) * batch / rate
    return {
        "images/s": batch / wall_of["ours"],
        "over plain": wall_of["plain"] / wall_of["ours"],
        "cpu": cpu_of["plain"] / cpu_of["ours"],
        "over published": wall_of["published"] / wall_of["ours"],
        "cpu, published": cpu_of["published"] / cpu_of["ours"],
        "product GFLOP/s": rate / 1e9,
        **{f"share, {name}": achieved / wall_of[name] for name in steps},
        "first loss apart": apart,
        **where_time_goes(ours, x, y),
    }


def where_time_goes(ours: Ours, x: Tensor, y: Tensor) -> dict[str, float]:
    """Share of our step by kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        ours.step(x, y)
    times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in record.key_averages()}
    total = sum(times.values())
    shares = {
        kind: sum(t for key, t in times.items() if key.startswith(prefixes) and not key.startswith("mse")) / total
        for kind, prefixes in GROUPS.items()
    }
    return shares | {"rest": 1 - sum(shares.values())}


def main() -> int:
    args = parse_args("Compare a training step with plain torch and with the published way of doing it.")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    rows, bars = [], []
    for tokens in TOKENS:
        for dtype in ("float32", "bfloat16"):
            r = compare(tokens, dtype, rounds=6 if args.quick else 9)
            rows.append((tokens, dtype, *r.values()))
            bars.append(Bar(f"images/s over plain torch, {tokens} tokens, {dtype}", r["over plain"],
                            at_least=NOT_SLOWER, reason="not slower, but for noise"))  # fmt: skip
            close = 1e-4 if dtype == "float32" else 0.05
            bars.append(Bar(f"first losses apart, {tokens} tokens, {dtype}", r["first loss apart"], at_most=close,
                            reason="the same mathematics"))  # fmt: skip
    dist.destroy_process_group()
    return finish(args, rows, ("tokens", "dtype", *r), bars)


if __name__ == "__main__":
    sys.exit(main())
