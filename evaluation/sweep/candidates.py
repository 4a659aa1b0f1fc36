"""What a guidance sweep tries: every combination of guidance, denoising, temperature, form and guided blocks that differs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log
from tarflow.evaluation.samples.draw import NO_LABEL, check_guidance, check_noise
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.trainer.config.schema import Config

MAX_CANDIDATES = 1000
FIRST_ROUND = 500


@dataclass
class SweepRequest:
    """What to try; an empty list stands for the run's own value."""

    run: Path
    guidance: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    denoise: Sequence[float] = ()
    attn_temp: Sequence[float] = ()
    noise_level: Sequence[float] = ()  # of a model that is told the noise level
    denoise_steps: Sequence[int] = ()
    guidance_form: Sequence[str] = ()
    guide_blocks: Sequence[tuple[int, ...]] = ()  # an empty tuple: all blocks
    start: int = 0  # samples of the first round; 0 = FIRST_ROUND, or half of the last round's if that is less
    final: int = 0  # samples of the last round; 0 = evaluation.num_samples
    step: int | None = None
    images: int | None = None
    choose: Literal["clear", "best", "none"] = "clear"  # when the best becomes the run's default
    device: str = "auto"
    overrides: list[str] = field(default_factory=list)


def sweep_candidates(request: SweepRequest, own: ResolvedSampling, config: Config, log: Log) -> list[ResolvedSampling]:
    """Every combination that differs from the others; one without any effect is logged and skipped.

    Raises EvaluationError for values out of range, and for what a model of this configuration cannot do.
    """
    denoise = list(request.denoise) or [own.denoise_multiplier]
    temperatures = list(request.attn_temp) or [own.settings.attn_temp]
    forms = list(request.guidance_form) or [own.settings.guidance_form]
    blocks = list(request.guide_blocks) or [own.settings.guide_blocks]
    _check_range("--guidance", request.guidance, 0.0)
    _check_range("--denoise", denoise, 0.0)
    _check_range("--attn-temp", temperatures, 1e-4)
    if config.train.noise == "uniform" and any(denoise):
        raise EvaluationError("--denoise needs a model trained with gaussian noise; this run has train.noise=uniform")
    _check_blocks(blocks, config.model.num_blocks)
    levels: list[float | None] = [*request.noise_level] or [own.settings.noise_level]
    steps: list[int | None] = [*request.denoise_steps] or [own.settings.denoise_steps]
    axes = (request.guidance, denoise, temperatures, forms, blocks, levels, steps)
    if (number := math.prod(len(values) for values in axes)) > MAX_CANDIDATES:
        raise EvaluationError(
            "--guidance x --denoise x --attn-temp x --guidance-form x --guide-blocks x --noise-level x --denoise-steps make "
            f"{number:,} settings, more than the limit of {MAX_CANDIDATES}"
        )
    unlabelled = not config.model.num_classes or set(own.labels) == {NO_LABEL}
    found: dict[tuple[Any, ...], ResolvedSampling] = {}
    for w, m, t, form, guided, level, count in product(*axes):
        # Without labels, only the temperature tells the guided pass from the other one.
        if w and unlabelled and t == 1:
            log(f"skipped: guidance {w:g} with attention temperature 1 has no effect without labels")
            continue
        # Without guidance the others have no effect; blocks may be counted from either end.
        t, form, guided = (t, form, guided) if w else (temperatures[0], forms[0], blocks[0])
        key = (
            w,
            m,
            t,
            form,
            frozenset(block % config.model.num_blocks for block in guided or range(config.model.num_blocks)),
            level,
            count if m else None,
        )
        if key not in found:
            changed = own.with_changes(guidance=w, denoise=m, attn_temp=t, guidance_form=form, guide_blocks=guided)
            found[key] = changed.with_changes(
                noise_level=level, denoise_steps=count if m else own.settings.denoise_steps
            )
    if not found:
        raise EvaluationError("nothing is left to sweep: without labels give --attn-temp values other than 1")
    for candidate in found.values():
        check_noise(candidate, config.model, config.train.noise_range)
        check_guidance(candidate, config.model, config.train.label_dropout)
    return list(found.values())


def _check_blocks(sets: Sequence[tuple[int, ...]], blocks: int) -> None:
    if bad := [block for guided in sets for block in guided if not -blocks <= block < blocks]:
        raise EvaluationError(
            f"--guide-blocks {bad[0]}: the model has {blocks} blocks (0..{blocks - 1}, or -1 for the last, which is sampled "
            "first)"
        )


def _check_range(option: str, values: Sequence[float], low: float) -> None:
    if bad := [v for v in values if not low <= v < math.inf]:
        raise EvaluationError(f"{option} {bad[0]:g} must be a number of at least {low:g}")
