"""Compute the chunks of a result together with any other workers."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tarflow.evaluation.metrics.bits_per_dim import BitsPerDim
from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.samples.store import SampleStore
from tarflow.evaluation.stopwatch import Stopwatch
from tarflow.evaluation.worker.chunk_plan import ChunkPlan
from tarflow.evaluation.worker.chunk_results import MergedChunks, SamplesPart, empty_part, save_likelihood
from tarflow.evaluation.worker.task import EvaluationTask

LONG_S = 10  # a chunk that takes longer is logged


class FeatureNetwork(Protocol):
    """What drawing needs of a feature network."""

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels uint8 [n, C, H, W] to features [n, dim] and spatial features [n, spatial_dim]."""


def _nothing(_: object) -> None: ...


@dataclass(frozen=True)
class Hooks:
    """Called around the steps of an evaluation, with the chunk's name or with what is about to be measured."""

    before_chunk: Callable[[str], None] = _nothing
    after_chunk: Callable[[str], None] = _nothing
    before_measure: Callable[[MergedChunks], None] = _nothing


def compute_chunks(
    plan: ChunkPlan, is_over: Callable[[], bool], store: SampleStore | None = None, hooks: Hooks | None = None
) -> bool:
    """Help until every chunk is there; False if the work `is_over` before that."""
    hooks = hooks or Hooks()
    for name in plan.work.give_back(plan.names, plan.is_valid):
        plan.task.log(f"  {plan.work.path(name)} is damaged and computed again")

    def compute(name: str, path: Path) -> None:
        hooks.before_chunk(name)
        compute_chunk(plan, name, path, store)
        hooks.after_chunk(name)

    return plan.work.work_through(plan.names, compute, is_over)


def compute_chunk(plan: ChunkPlan, name: str, path: Path, store: SampleStore | None = None) -> None:
    """Compute one chunk into the file at `path`; `store` keeps the samples themselves."""
    task, watch, begun = plan.task, Stopwatch(), time.monotonic()
    task.real.batches.used.clear()  # from here on, of this chunk
    if name in plan.samples:
        part, indices = empty_part(task), plan.samples[name]
        draw_chunk(part, task.sampler, task.real.features, indices, plan.batch_size, watch, store)
        part.save(plan.chunk(name, path), _about(task, watch))
        done = f"samples {indices.start}..{indices.stop - 1} of {task.settings.num_samples}"
    else:
        with watch.phase("likelihood"):
            bits = _likelihood(plan, plan.likelihood[name])
        save_likelihood(plan.chunk(name, path), bits, _about(task, watch))
        done = f"{len(bits.values)} held-out images"
    if time.monotonic() - begun > LONG_S:
        task.log(f"  {done}: {time.monotonic() - begun:.0f} s")


def draw_chunk(
    part: SamplesPart,
    sampler: Sampler,
    features: FeatureNetwork,
    indices: range,
    batch_size: int,
    watch: Stopwatch,
    store: SampleStore | None = None,
) -> None:
    """Draw the samples of a chunk batch by batch, and add them to its part."""
    batches = sampler.draw_all(indices, batch_size)
    while True:
        with watch.phase("sampling"):
            drawn = next(batches, None)
        if drawn is None:
            break
        pixels = drawn.pixels()
        with watch.phase("features"):
            rows, spatial = features.with_spatial(pixels)
        with watch.phase("statistics"):
            part.add(drawn, pixels, rows, spatial)
        if store:
            with watch.phase("saving"):
                store.add(drawn)
    if store:
        store.flush(indices)


def _likelihood(plan: ChunkPlan, part: int) -> BitsPerDim:
    task = plan.task
    bits = BitsPerDim(task.settings.likelihood)
    assert task.held_out is not None
    for batch in task.held_out.batches(True, plan.batch_size, part, len(plan.likelihood)):
        bits.add(task.source.model, *batch, task.real.batches)
    return bits


def _about(task: EvaluationTask, watch: Stopwatch) -> dict[str, Any]:
    """Who computed a chunk, how long it took, with which code, and how many images each stage took at a time."""
    by, batches = f"{platform.node()}:{os.getpid()}", dict(task.real.batches.used)
    return {"by": by, "seconds": watch.seconds, "code": task.code, "batches": batches}
