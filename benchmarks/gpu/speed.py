"""Time and memory: of denoising, of sampling, and of training steps against the plan and the peak rate."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import published_sampler
from benchmarks.common import Bar
from benchmarks.gpu.bench import Bench, Figures, Steps
from tarflow.models.cost import flops_per_image, peak_rate
from tarflow.models.denoise import denoise
from tarflow.models.flow import FlowBlock, TarFlow
from tarflow.models.likelihood import log_likelihood
from tarflow.models.presets import preset
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.inverse import invert
from tarflow.models.sampling.measure import measure_plan
from tarflow.models.sampling.plan import BlockPlan, SamplingPlan
from tarflow.models.sampling.sequential import invert_block
from tarflow.models.sampling.settings import SamplingSettings
from tarflow.trainer.parallel.memory import rank_memory


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


def graphs(bench: Bench) -> Figures:
    """Seconds to sample a batch with guidance, from the time of one block: the published way, eager, replayed, and `auto`."""
    figures: Figures = {}
    recorded = bench.on_gpu("recording of graphs")
    shapes = (bench.model,) if bench.tiny else (preset("imagenet64-4-1024-8-8"), bench.model)  # 256 and 1,024 tokens
    for shape in shapes:
        model = bench.weights(shape.model_copy(update={"num_blocks": 1}))
        for count in (bench.batch,) if bench.tiny else (1, 16, 64):
            bench.fresh()
            z = torch.randn(count, shape.num_tokens, shape.token_dim, device=bench.device)
            auto, ways = _ways(model, z)
            seconds, images = {}, {}
            for name, way in ways.items():
                way()  # what begins at a first call
                bench.wait()
                began = time.perf_counter()
                images[name] = way()
                bench.wait()
                seconds[name] = (time.perf_counter() - began) * shape.num_blocks
            where = f"{shape.num_tokens} tokens, batch {count}"
            apart = {name: float((found - images["eager"]).abs().max()) for name, found in images.items()}
            bench.bars.append(Bar(f"images apart, graphed, {where}", apart["graphed"], at_most=1e-4))
            if recorded:
                gain = seconds["published"] / min(seconds["graphed"], seconds["auto"])
                bench.bars.append(Bar(f"over the published way, {where}", gain, at_least=10 if count <= 16 else 5))
            measured = {"s a batch": seconds, "images apart": apart, "peak GB": bench.peak_gb()}
            figures[where] = measured | {"plan": str(auto), **auto.machine}
    return figures


def _ways(model: TarFlow, z: Tensor) -> tuple[SamplingPlan, dict[str, Callable[[], Tensor]]]:
    """The plan of `auto`, and what draws the images of noise z by each way."""
    y, settings = torch.zeros(len(z), dtype=torch.long, device=z.device), SamplingSettings(guidance=2.0, method="auto")
    plans = {name: SamplingPlan(blocks=[BlockPlan(engine=name)]) for name in ("eager", "graphed")}
    plans["auto"] = measure_plan(model, z, y, settings)

    def planned(plan: SamplingPlan) -> Tensor:
        return invert(model, z, y, settings, plan).images

    ways: dict[str, Callable[[], Tensor]] = {"published": partial(published_sampler.sample, model, z, y, 2.0)}
    return plans["auto"], ways | {name: partial(planned, plan) for name, plan in plans.items()}


def rate(bench: Bench) -> Figures:
    """Steps by checkpointing mode, compile and unit of sharding: time, share of the peak rate, memory over the cost model."""
    batch = bench.batch if bench.tiny else 32  # 16 leave the device waiting for the host
    figures: Figures = {}
    norms: dict[int, float] = {}  # of the second step's gradient, by images: every way computes the same
    for mode, compiled, unit, images in (
        ("selective", False, 0, batch), ("none", True, 1, batch), ("none", True, 2, batch), ("none", True, 4, batch),
        ("none", True, 0, batch), ("selective", True, 0, 2 * batch), ("full", True, 0, 2 * batch),
    ):  # fmt: skip
        if bench.tiny and unit in (2, 4):  # as 1
            continue
        bench.fresh()
        steps = Steps(bench, mode, compiled, images, layers_per_unit=unit)
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
        peak = peak_rate(torch.cuda.get_device_name()) if bench.on_gpu("share of the peak rate") else None
        name = f"{mode}{', compiled' if compiled else ''}, {unit or 'all'} layers a unit, {images} images"
        figures[name] = {"ms": seconds * 1e3, "host ms": host * 1e3, "first two s": first, "peak GB": bench.peak_gb(),
                         "cost model GB": model_gb, "norm": norm, "MFU": flops / seconds / peak if peak else None}  # fmt: skip
        bench.bars.append(Bar(f"gradient norm, {name}", abs(norm / expected - 1), at_most=1e-2))
        if bench.on_gpu("memory against the plan"):
            over = bench.peak_gb() / model_gb
            bench.bars += [Bar(f"peak over the cost model, {name}", over, at_most=1.1),
                           Bar(f"cost model over the peak, {name}", 1 / over, at_most=1.25)]  # fmt: skip
        if not compiled and bench.on_gpu("times of kernels"):
            with profile(activities=[ProfilerActivity.CUDA]) as record:
                steps.take(9)
                bench.wait()
            events = sorted(record.key_averages(), key=lambda event: -event.self_device_time_total)
            figures["kernels, ms"] = {e.key[:60]: e.self_device_time_total / 1e3 for e in events[:10]}
        del steps
    return figures
