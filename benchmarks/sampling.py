"""Sampling side by side: the published way, today's sequential path in torch, the compiled engine, iterations, and `auto`.

Weights are trained by this command, on pictures drawn for it: on untrained weights an iteration has nothing to do. Everything
is guided (weight 2, annealed). The ways take turns in one process; medians count. Bars are on CPU seconds, which a neighbour on
the machine moves least. Errors are against the sequential path in torch, float32, in units of the image's range [-1, 1].
"""

import io
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import published_sampler
from benchmarks.common import Bar, finish, parse_args, table
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics, FrechetInfluence, frechet_distance
from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import TarFlow, flow_loss
from tarflow.models.init import init_weights
from tarflow.models.sampling import native
from tarflow.models.sampling.engine import EagerBlock
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.inverse import Sampled, invert
from tarflow.models.sampling.measure import WIDTHS, measure_plan
from tarflow.models.sampling.plan import BlockPlan, SamplingPlan
from tarflow.models.sampling.settings import SamplingSettings

SETTINGS = SamplingSettings(guidance=2.0, method="auto")
CLASSES = 10


@dataclass(frozen=True)
class Case:
    name: str
    config: TarFlowConfig
    batches: tuple[int, ...]
    steps: int  # of training
    least: dict[int, float] = field(default_factory=dict)  # batch -> compiled engine over the published way


def a_config(image: int, patch: int, width: int, blocks: int, layers: int) -> TarFlowConfig:
    return TarFlowConfig(
        image_size=image, patch_size=patch, channels=width, num_blocks=blocks, layers_per_block=layers, num_classes=CLASSES,
        in_channels=1 if image == 28 else 3,
    )  # fmt: skip


CASES = [
    Case("32 px, T 64, 128 x 4 x 2", a_config(32, 4, 128, 4, 2), (1, 16), 300, {1: 7.0, 16: 4.5}),
    Case("28 px, T 196, 128 x 4 x 2", a_config(28, 2, 128, 4, 2), (1, 16), 300, {1: 7.0, 16: 4.5}),
    Case("64 px, T 256, 256 x 4 x 4", a_config(64, 4, 256, 4, 4), (1, 16), 150, {1: 7.0, 16: 4.5}),
    Case("64 px, T 256, 768 x 2 x 8", a_config(64, 4, 768, 2, 8), (4,), 20, {4: 3.0}),
]


def pictures(n: int, config: TarFlowConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Soft blobs on a gradient, [n, C, H, W] in [-1, 1]; the class is where the blob is, with noise as in training."""
    y = torch.randint(0, config.num_classes, (n,), generator=generator)
    u = torch.rand(n, 6, generator=generator)
    side = torch.linspace(-1, 1, config.height)
    angle = 2 * torch.pi * (y + u[:, 0]) / config.num_classes
    rows, columns = side[None, :, None], side[None, None, :]
    near = (rows - 0.6 * torch.sin(angle)[:, None, None]) ** 2 + (columns - 0.6 * torch.cos(angle)[:, None, None]) ** 2
    blob = torch.exp(-near / (0.05 + 0.15 * u[:, 1, None, None]))
    slope = (u[:, 2, None, None] - 0.5) * rows + (u[:, 3, None, None] - 0.5) * columns
    colours = torch.rand(n, config.in_channels, 1, 1, generator=generator)
    x = (2 * blob[:, None] * colours - 0.7 + slope[:, None]).clamp(-1, 1)
    return x + 0.07 * torch.randn(x.shape, generator=generator), y


def trained(config: TarFlowConfig, steps: int) -> TarFlow:
    model, generator = TarFlow(config), torch.Generator().manual_seed(0)
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    loss = torch.zeros(())
    for step in range(steps):
        x, y = pictures(16, config, generator)
        dropped = torch.rand(len(y), generator=generator) < 0.1
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        loss = flow_loss(*model(x, torch.where(dropped, -1, y))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(
        f"trained: {config.image_size} px, {config.num_tokens} tokens, {steps} steps, loss {loss.item():.3f}",
        flush=True,
    )
    return model.eval().requires_grad_(False)


def plan_of(config: TarFlowConfig, engine: str, path: str = "sequential", width: int = 0) -> SamplingPlan:
    return SamplingPlan(blocks=[BlockPlan(engine=engine, path=path, width=width)] * config.num_blocks)


def by_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median (seconds, CPU seconds) of each way, one after the other in each round; a round before that warms up."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            if number:
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: tuple(statistics.median(part) for part in zip(*times)) for name, times in found.items()}


def operations(config: TarFlowConfig, batch: int) -> float:
    """Floating-point operations of the products of guided sampling, attention included."""
    c, t = config.channels, config.num_tokens
    layer = (4 + 2 * config.expansion) * c * c + t * c  # a token sees half of the others, twice
    ends = 3 * config.token_dim * c
    return 2.0 * 2 * batch * t * (sum(config.layers) * layer + config.num_blocks * ends)


def product_rate() -> float:
    """Operations a CPU second of a large float32 product: what the machine can do."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    a @ b
    begun = time.process_time()
    for _ in range(5):
        a @ b
    return 5 * 2 * 1024**3 / (time.process_time() - begun)


def torch_alone(case: Case, batch: int) -> bool:
    """Whether the paths are compared in torch, too, as where there is no compiler: not where that takes many minutes."""
    return case.config.channels < 768 and batch * case.config.num_tokens <= 3200


def speed(
    case: Case, model: TarFlow, batch: int, rounds: int, rate: float, plans_in_torch: set[str]
) -> tuple[list[Any], list[Bar]]:
    config, y = model.config, torch.arange(batch) % CLASSES
    noise = torch.randn(batch, config.num_tokens, config.token_dim, generator=torch.Generator().manual_seed(1))
    measured = measure_plan(model, noise, y, SETTINGS)
    plans = {"eager": plan_of(config, "eager"), "compiled": plan_of(config, "native")}
    if config.channels < 768:
        plans |= {"window 16": plan_of(config, "native", "window", 16), "whole": plan_of(config, "native", "whole")}
    plans["auto"] = measured
    if torch_alone(case, batch):
        plans |= {f"eager, window {width}": plan_of(config, "eager", "window", width) for width in WIDTHS}
        plans["eager, whole"] = plan_of(config, "eager", "whole")
        plans["eager, auto"] = measure_plan(model, noise, y, SETTINGS, compiled=False)
    ways: dict[str, Callable[[], Any]] = {"published": lambda: published_sampler.sample(model, noise, y, 2.0)}
    for name, plan in plans.items():
        ways[name] = lambda plan=plan: invert(model, noise, y, SETTINGS, plan)  # type: ignore[misc]
    exact = invert(model, noise, y, SETTINGS, plans["eager"]).images
    errors = {name: worst(way(), exact) for name, way in ways.items()}
    times = by_turns(ways, rounds)
    rows = [
        (case.name, batch, name, wall, cpu, times["published"][1] / cpu, times["eager"][1] / cpu,
         operations(config, batch) / cpu / rate, errors[name])
        for name, (wall, cpu) in times.items()
    ]  # fmt: skip
    alone = products_alone(model, batch)
    print(
        f"{case.name}, batch {batch}: the linear layers' products alone take {alone:.3g} CPU s in torch, of eager's "
        f"{times['eager'][1]:.3g}; the published way takes {times['published'][1] / alone:.2f} x as long as they do",
        flush=True,
    )
    for name in ("auto", "eager, auto"):
        if name in plans:
            print(f"plan of {name}, {case.name}, batch {batch}: {plans[name]}", flush=True)
    where = f"{case.name}, batch {batch}"
    bars = [
        Bar(
            f"compiled over published, {where}",
            times["published"][1] / times["compiled"][1],
            at_least=case.least[batch],
        )
    ]
    if batch in (1, 16):
        bars.append(Bar(f"eager over published, {where}", times["published"][1] / times["eager"][1], at_least=2.8))
    in_torch = {name: cpu for name, (_, cpu) in times.items() if name.startswith("eager")}
    best = min(cpu for name, (_, cpu) in times.items() if name not in ("published", "auto", "eager, auto"))
    bars.append(Bar(f"auto over the best, {where}", times["auto"][1] / best, at_most=1.1))
    if auto := in_torch.pop("eager, auto", None):
        plans_in_torch.add(" ".join(block.path for block in plans["eager, auto"].blocks))
        bars.append(Bar(f"auto over the best in torch alone, {where}", auto / min(in_torch.values()), at_most=1.1))
    bars += [
        Bar(f"error of {name}, {where}", error, at_most=1e-4) for name, error in errors.items() if name != "published"
    ]
    return rows, bars


def worst(found: Sampled | Tensor, exact: Tensor) -> float:
    images = found.images if isinstance(found, Sampled) else found
    return float((images.double() - exact.double()).abs().max())


def iterations(case: Case, model: TarFlow, samples: int, plot: Path | None) -> list[Bar]:
    """Passes, accepted tokens and certificates by block and path, also drawn; errors against certificates."""
    config, y = model.config, torch.arange(samples) % CLASSES
    noise = torch.randn(samples, config.num_tokens, config.token_dim, generator=torch.Generator().manual_seed(2))
    every = torch.ones(samples, dtype=torch.bool)
    exact = invert(model, noise, y, SETTINGS, plan_of(config, "eager"), every)
    rows, ratio = [], 0.0
    for path, width in (("sequential", 0), ("window", 8), ("window", 32), ("whole", 0), ("joint", 0)):
        engine = "eager" if path == "joint" else "native"
        found = exact if path == "sequential" else invert(
            model, noise, y, SETTINGS, plan_of(config, engine, path, width), every
        )  # fmt: skip
        error = (found.images.double() - exact.images.double()).abs().flatten(1).amax(1)
        if path != "sequential":
            ratio = max(ratio, float((error / found.certificate.sum(1)).max()))
        for block in reversed(range(config.num_blocks)):
            passes = found.passes[:, block].double()
            certificate = found.certificate[:, block]
            rows.append((
                f"{path} {width or ''}", block, float(passes.mean()), int(passes.max()),
                (config.num_tokens - 1) / float(passes.mean()), float(certificate.median()), float(certificate.max()),
                int(found.redone[:, block].sum()), float(error.max()),
            ))  # fmt: skip
    header = (
        "path",
        "block",
        "passes",
        "most",
        "tokens a pass",
        "certificate, median",
        "largest",
        "redone",
        "error of the image",
    )
    print(f"{case.name}: {samples} samples, guided\n{table(rows, header)}", flush=True)
    if plot:
        plot.write_text(drawn(rows, f"{case.name}, {samples} samples", config.num_tokens - 1))
    return [Bar(f"error over certificate, {case.name}, {samples} samples", ratio, at_most=2.0)]


def drawn(rows: list[Any], title: str, most: int) -> str:
    """The table of `iterations` as SVG text: passes and largest certificates of each block, a colour for each path."""
    paths = list(dict.fromkeys(row[0].strip() for row in rows))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tarflow", "font.size": 9}):
        figure = Figure(figsize=(7.5, 3.0), layout="constrained")
        FigureCanvasSVG(figure)
        passes, certificates = figure.subplots(1, 2)
        for place, path in enumerate(paths):
            mine = [row for row in rows if row[0].strip() == path]  # in the order of sampling
            at = [number + 0.15 * place for number in range(len(mine))]
            for axes, column in ((passes, 2), (certificates, 6)):
                axes.bar(at, [row[column] for row in mine], 0.15, label=path, color=f"C{place}")
        passes.set_ylabel("passes until a sample is done (mean)")
        passes.axhline(most, color="gray", lw=0.8, ls=":")
        certificates.set_ylabel("largest certificate")
        certificates.set_yscale("log")
        certificates.axhline(SETTINGS.tolerance, color="gray", lw=0.8, ls=":")
        for axes in (passes, certificates):
            blocks = [row[1] for row in rows if row[0].strip() == paths[0]]
            axes.set_xticks([number + 0.3 for number in range(len(blocks))], [f"block {block}" for block in blocks])
        figure.legend(
            *passes.get_legend_handles_labels(), loc="outside lower center", ncols=len(paths), frameon=False, fontsize=8
        )
        figure.suptitle(title, fontsize=10)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def distances(case: Case, model: TarFlow, samples: int) -> list[Bar]:
    """The Frechet distance to pictures like those of training, of `auto` and of sequential samples of the same noise.

    Features are the picture in 4 x 4 cells, so that the covariance has full rank and nothing is downloaded.
    """
    config, y = model.config, torch.arange(samples) % CLASSES
    noise = torch.randn(samples, config.num_tokens, config.token_dim, generator=torch.Generator().manual_seed(3))
    real = FeatureStatistics(16 * config.in_channels)
    real.add(features(pictures(4 * samples, config, torch.Generator().manual_seed(4))[0]))
    found = {}
    plan = measure_plan(model, noise[:64], y[:64], SETTINGS)
    for name, chosen in (("sequential", plan_of(config, "eager")), ("auto", plan)):
        parts = [invert(model, noise[at], y[at], SETTINGS, chosen).images for at in torch.arange(samples).split(64)]
        rows = features(torch.cat(parts))
        statistics_of = FeatureStatistics(real.dim)
        statistics_of.add(rows)
        found[name] = frechet_distance(statistics_of, real).distance, FrechetInfluence(statistics_of, real).stderr(rows)
        print(
            f"{case.name}: Frechet distance of {samples} {name} samples {found[name][0]:.6f} +- {found[name][1]:.6f}",
            flush=True,
        )
    apart = abs(found["auto"][0] - found["sequential"][0])
    return [Bar(f"Frechet distances apart, in error bars, {case.name}", apart / found["sequential"][1], at_most=1.0)]


def features(images: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def products_alone(model: TarFlow, batch: int) -> float:
    """CPU seconds of nothing but the products of guided sampling, one after the other in torch: what no torch code beats."""
    config, rows = model.config, 2 * batch
    c, up = config.channels, config.expansion * config.channels
    ends = [(config.token_dim, c), (c, 2 * config.token_dim)]
    shapes = [*ends, *[(c, 3 * c), (c, c), (c, up), (up, c)] * config.layers[0]]  # all blocks here are as deep
    given = [(torch.randn(rows, i), torch.randn(i, o), torch.empty(rows, o)) for i, o in shapes]
    begun, tokens = time.process_time(), config.num_tokens - 1
    for _ in range(tokens):
        for x, weight, out in given:
            torch.mm(x, weight, out=out)
    return (time.process_time() - begun) * config.num_blocks


def memory(case: Case, model: TarFlow, batch: int) -> Bar:
    """Cache and packed weights of the compiled engine against the cache in torch."""
    block: Any = model.blocks[0]
    guidance = Guidance.of_block(SETTINGS, 0, model.config.num_blocks, model.config.num_tokens)
    y = torch.arange(batch) % CLASSES
    ours, eager = native.NativeBlock(block, y, batch, guidance), EagerBlock(block, y, batch, guidance)
    cache = sum(part.keys.nbytes + part.values.nbytes for part in ours.parts)
    weights = sum(t.nbytes for part in ours.parts[:1] for t in part.weights_in_use())
    print(f"{case.name}, batch {batch}: cache {cache / 2**20:.1f} MiB (torch {eager.cache.nbytes / 2**20:.1f}), packed weights "
          f"of a block {weights / 2**20:.1f} MiB", flush=True)  # fmt: skip
    return Bar(f"cache over torch's, {case.name}, batch {batch}", cache / eager.cache.nbytes, at_most=1.2)


def main() -> int:
    args = parse_args(
        "Compare ways of sampling.", [("--threads", {"type": int, "default": 1, "help": "CPU threads (default 1)"}),
         ("--cases", {"type": int, "nargs": "+", "choices": range(1, len(CASES) + 1), "default": [*range(1, len(CASES) + 1)],
                      "help": "of the models: " + "; ".join(f"{number} = {c.name}" for number, c in enumerate(CASES, 1))}),
         ("--plot", {"type": Path, "metavar": "FILE", "help": "draw passes and certificates of model 1 there, as SVG"})],
    )  # fmt: skip
    torch.set_num_threads(args.threads)
    rows: list[Any] = []
    bars: list[Bar] = []
    rate = product_rate()
    print(f"a 1,024^3 float32 product: {rate / 1e9:.0f} GFLOP/s a CPU second, {args.threads} threads", flush=True)
    plans_in_torch: set[str] = set()
    for case in [CASES[number - 1] for number in args.cases][: 1 if args.quick else None]:
        model = trained(case.config, 40 if args.quick else case.steps)
        if problem := native.why_not(model.blocks[0]):  # type: ignore[arg-type]
            print(f"no compiled engine: {problem}")
            return 1
        for batch in case.batches:
            found = speed(case, model, batch, 2 if args.quick else 3, rate, plans_in_torch)
            rows += found[0]
            bars += found[1]
            bars.append(memory(case, model, batch))
        if case.config.channels == 128:
            bars += iterations(case, model, 32 if args.quick else 500, args.plot if case is CASES[0] else None)
        if case is CASES[0]:
            bars += distances(case, model, 200 if args.quick else 2000)
    if not args.quick and len(args.cases) == len(CASES):
        bars.append(Bar("different plans in torch alone", len(plans_in_torch), at_least=2))
    header = ("model", "batch", "way", "s", "CPU s", "x published", "x eager", "share of the product rate", "error")
    return finish(args, rows, header, bars, ("torch",))


if __name__ == "__main__":
    sys.exit(main())
