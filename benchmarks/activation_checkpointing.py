"""Activation checkpointing: bytes kept for the backward pass (measured through saved-tensor hooks), memory, time.

A 64-layer narrow model at T = 1,024. Bars: `full` keeps at most 1/8 of what `none` keeps (a layer keeps its input
instead of about sixteen such tensors; the rest of a block is not checkpointed) and costs at most 1.4 x its time (a
third forward pass on two backward-equivalents is 1.33 x); the cost model's bytes within 10% of the measured.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import Bar, finish, parse_args
from benchmarks.golden import training_config
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import activation_bytes
from tarflow.models.flow import TarFlow, flow_loss
from tarflow.models.init import init_weights
from tarflow.trainer.config.schema import Config
from tarflow.trainer.parallel.apply import apply_parallelism

MODES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "selective": {"mode": "selective"},
    "every 2nd layer": {"mode": "selective", "every_nth_layer": 2},
    "full": {"mode": "full"},
    "full, offloaded": {"mode": "full", "offload": True},
}


def model_config(quick: bool) -> TarFlowConfig:
    return TarFlowConfig(
        image_size=32 if quick else 64,
        patch_size=2,
        channels=64,
        num_blocks=8,
        layers_per_block=2 if quick else 8,
        num_classes=0,
    )


def build(shape: TarFlowConfig, mode: str, dtype: torch.dtype = torch.float32) -> tuple[TarFlow, Config]:
    config = training_config(shape, activation_checkpoint=MODES[mode])
    model = TarFlow(shape)
    init_weights(model, 0)
    model.to(dtype)
    apply_parallelism(model, config, mesh=None)
    return model, config


class KeptBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of distinct storages that autograd saves, weights apart."""

    def __init__(self, model: TarFlow) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._kept: dict[int, tuple[int, torch.Tensor]] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            # The tensor is held, so that its address is not given to another one meanwhile.
            self._kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    @property
    def total(self) -> int:
        return sum(size for size, _ in self._kept.values())


def kept_bytes(shape: TarFlowConfig, mode: str, dtype: torch.dtype = torch.float32) -> float:
    """Measured bytes per image.

    A checkpointed layer keeps its input in a closure, which no hook sees: the inputs are counted by hooks on the layers.
    """
    model, _ = build(shape, mode, dtype)
    inputs: dict[int, tuple[int, torch.Tensor]] = {}
    counter = KeptBytes(model)

    def note(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        storage = args[0].untyped_storage()
        inputs[storage.data_ptr()] = (storage.nbytes(), args[0])

    if mode != "none":
        for block in model.blocks:
            for layer in block.attn_blocks:  # type: ignore[union-attr]
                layer.register_forward_pre_hook(note)
    x = torch.randn(1, *shape.image_shape)
    with counter:
        z, logdet = model(x)
        loss = flow_loss(z, logdet).mean()
    counter._kept.update(inputs)
    del loss
    return counter.total


def gradients(shape: TarFlowConfig, mode: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    model, _ = build(shape, mode, dtype)
    x = torch.randn(2, *shape.image_shape, generator=torch.Generator().manual_seed(0))
    flow_loss(*model(x)).mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def measure(quick: bool) -> dict[str, dict[str, float]]:
    """Step seconds (median, alternating) and CPU seconds per mode."""
    shape = model_config(quick)
    x = torch.randn(2, *shape.image_shape)
    models = {mode: build(shape, mode)[0] for mode in MODES}
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    cpu: dict[str, list[float]] = {mode: [] for mode in MODES}
    for round_number in range(3 if quick else 6):
        for mode, model in models.items():
            wall, used = time.perf_counter(), time.process_time()
            flow_loss(*model(x)).mean().backward()
            model.zero_grad()
            if round_number:  # the first round warms up
                times[mode].append(time.perf_counter() - wall)
                cpu[mode].append(time.process_time() - used)
    return {mode: {"step": median(times[mode]), "cpu": median(cpu[mode])} for mode in MODES}


def peak_memory(mode: str, quick: bool) -> float:
    """Bytes by which one step raises the peak of a fresh process."""
    code = f"from benchmarks.activation_checkpointing import step_peak; step_peak({mode!r}, {quick})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    return float(done.stdout)


def step_peak(mode: str, quick: bool) -> None:
    """In a fresh process: print the bytes by which one step raises the peak of its memory (Linux)."""
    shape = model_config(quick)
    tiny, _ = build(shape.model_copy(update={"image_size": 4}), mode)
    flow_loss(*tiny(torch.randn(1, shape.in_channels, 4, 4))).mean().backward()  # loads what is loaded at first use
    model, _ = build(shape, mode)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = memory("VmRSS")
    flow_loss(*model(torch.randn(4, *shape.image_shape))).mean().backward()
    print(memory("VmHWM") - before)


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> int:
    args = parse_args("Measure activation checkpointing.")
    shape = model_config(args.quick)
    kept = {mode: kept_bytes(shape, mode) for mode in MODES}
    speed = measure(args.quick)
    reference = gradients(shape, "none")
    rows, bars = [], []
    for mode, settings in MODES.items():
        estimate = activation_bytes(shape, settings["mode"], 4, settings.get("every_nth_layer", 0))
        same = all(torch.equal(a, b) for a, b in zip(reference, gradients(shape, mode)))
        peak, step, cpu = peak_memory(mode, args.quick), speed[mode]["step"], speed[mode]["cpu"]
        rows.append(
            (mode, kept[mode] / 2**20, estimate / 2**20, kept[mode] / kept["none"], peak / 2**20, step,
             step / speed["none"]["step"], cpu / speed["none"]["cpu"], "bitwise" if same else "DIFFERENT")
        )  # fmt: skip
        error = abs(estimate / kept[mode] - 1)
        bars.append(Bar(f"cost model's error, {mode}", error, at_most=0.1, reason="formula against saved tensors"))
        bars.append(Bar(f"gradients equal to none's, {mode}", float(same), at_least=1, reason="the same operations"))
    bars.append(Bar("full / none, bytes kept", kept["full"] / kept["none"], at_most=1 / 8, reason="inputs alone"))
    full = speed["full"]["step"] / speed["none"]["step"]
    bars.append(Bar("full / none, step time", full, at_most=1.4, reason="one more forward pass"))
    header = (
        "mode",
        "kept MiB/image",
        "cost model",
        "of none",
        "peak MiB (4 images)",
        "step s",
        "x none",
        "CPU x none",
        "gradients",
    )
    return finish(args, rows, header, bars)


if __name__ == "__main__":
    sys.exit(main())
