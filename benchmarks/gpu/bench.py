"""The device, the model that is measured on it, and training steps as the loop takes them."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partialmethod
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.common import Bar
from benchmarks.golden import training_config
from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import TarFlow
from tarflow.models.presets import preset
from tarflow.trainer.config.schema import Config
from tarflow.trainer.ema.ema import EMA
from tarflow.trainer.metrics import MetricAccumulator
from tarflow.trainer.parallel.torch_backend import ShardedBackend
from tarflow.trainer.parallel.world import World
from tarflow.trainer.step_inputs import StepInput

SMALL = TarFlowConfig(image_size=16, patch_size=4, channels=64, num_blocks=2, layers_per_block=2, num_classes=10)
Figures = dict[str, Any]


@dataclass
class Bench:
    """The device, the model that is measured on it, and the bars that the checks leave."""

    tiny: bool
    bars: list[Bar] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # by the check that runs: what this machine cannot show

    def __post_init__(self) -> None:
        self.device = torch.device("cpu" if self.tiny else "cuda:0")
        self.model = SMALL if self.tiny else preset("imagenet64-2-768-8-8")
        self.batch = 2 if self.tiny else 16

    def wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def on_gpu(self, what: str) -> bool:
        """Whether there is a GPU; without one, `what` is named among those that are left out."""
        if self.tiny and what not in self.left_out:
            self.left_out.append(what)
        return not self.tiny

    def peak_gb(self) -> float:
        """Of the allocator; NaN on the CPU, which has none to ask."""
        if not self.on_gpu("bytes of the allocator"):
            return float("nan")
        return torch.cuda.max_memory_allocated() / 1e9

    def fresh(self) -> None:
        """Nothing of the check before is left in memory."""
        gc.collect()
        if not self.tiny:  # tracing anew takes most of a dry run
            torch._dynamo.reset()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def compiler(self) -> Iterator[None]:
        """In a dry run layers are traced and not compiled, which takes most of a minute; the test suite compiles them."""
        if self.on_gpu("code generation"):
            yield
            return
        traced = partialmethod(nn.Module.compile, backend="aot_eager")
        with mock.patch.object(nn.Module, "compile", traced):
            yield

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
        world: World | None = None, **parallel: Any,
    ) -> None:  # fmt: skip
        """`batch`: images a micro-batch and rank; `parallel`: settings of that section."""
        batch, world = batch or bench.batch, world or World()
        self.bench, self.rank, self.images = bench, world.rank, batch * accumulation
        self.config = training_config(
            bench.model,
            train={
                "global_batch_size": self.images * world.size, "micro_batch_size": batch, "max_images": 10**6,
                "param_dtype": "bfloat16", "grad_clip": 1.0, "skip_spikes": True,
            },
            parallel={"backend": "fsdp2", **parallel}, activation_checkpoint={"mode": mode},
            compile={"enable": compiled},
        )  # fmt: skip
        with bench.compiler() if compiled else nullcontext():
            self.backend = ShardedBackend(self.config, bench.device, world)
        self.ema = EMA(self.backend, self.config.ema.relative_stds)
        self.window = MetricAccumulator(bench.device)

    def take(self, number: int) -> None:
        """One optimizer step; its images, noise and labels depend on `number` and the rank alone."""
        train, device = self.config.train, self.bench.device
        inputs = step_input(self.config, number + 1_000_000 * self.rank, self.images, pin=not self.bench.tiny)
        parts = list(inputs.micro_batches(train.micro_batch_size, train, device))
        stats = torch.zeros(3, device=device)
        for place, part in enumerate(parts, 1):
            stats += self.backend.forward_backward(part.images, part.labels, part.share, place == len(parts))
        self.window.add(stats, self.backend.optimizer_step(1e-4))
        self.ema.update(10_000 + number, train.global_batch_size)

    def seconds(self, first: int, count: int) -> tuple[float, float]:
        """Seconds a step, and of those the host's, over `count` steps; in a dry run over one."""
        count = 1 if self.bench.tiny else count
        self.bench.wait()
        began, host = time.perf_counter(), 0.0
        for number in range(first, first + count):
            asked = time.perf_counter()
            self.take(number)
            host += time.perf_counter() - asked
        self.bench.wait()
        return (time.perf_counter() - began) / count, host / count


def step_input(config: Config, number: int, n: int, pin: bool = False) -> StepInput:
    """`n` random images for one rank's step, drawn on the CPU."""
    generator = torch.Generator().manual_seed(number)
    shape = config.model.image_shape
    pixels = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator)
    noise = torch.randn(n, *shape, generator=generator)
    labels = torch.randint(-1, config.model.num_classes, (n,), generator=generator)
    if pin:
        pixels, noise, labels = (t.pin_memory() for t in (pixels, noise, labels))
    places = torch.arange(n)
    return StepInput(pixels, noise, labels, 0, ids=places, slots=places)
