"""What an evaluation will cost, before it begins: images, tokens, FLOPs, and hours at a rate that is stated or was measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tarflow.evaluation import results
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.worker.recipe import Recipe
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import denoising_flops, flops_per_image, sampling_flops

_BESIDE = ("features", "statistics", "saving")  # phases whose time goes with the number of samples
_ONCE = ("distance", "neighbours", "pictures")  # phases whose time does not


@dataclass(frozen=True)
class Work:
    """What one evaluation of one checkpoint computes."""

    samples: int
    guided: bool
    denoised: int  # steps of denoising
    held_out: int  # images
    draws: int  # of noise for each of them
    guide_blocks: tuple[int, ...] = ()  # that are guided; empty: all

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> "Work":
        """The work that settings ask for. Opens the index of the held-out images."""
        settings, held_out = recipe.settings, recipe.config.data.held_out
        images = 0
        if held_out is not None:
            images = ImageSet(held_out, recipe.config.model, settings.validation_images).num_images
        sampling = settings.sampling
        steps = sampling.settings.steps or int(sampling.denoise_multiplier > 0)
        own, draws = sampling.settings, settings.likelihood.draws
        return cls(settings.num_samples, own.guided, steps, images, draws, own.guide_blocks)

    @classmethod
    def of_result(cls, result: dict[str, Any]) -> "Work":
        """The work that a result took."""
        sampling, held_out = result["settings"]["sampling"], result.get("likelihood") or {}
        return cls(
            result["samples"]["asked"], sampling["guidance"] > 0,
            (sampling.get("denoise_steps") or 1) if sampling["denoise"] > 0 else 0,
            int(held_out.get("images") or 0), int(held_out.get("draws") or 1), tuple(sampling.get("guide_blocks") or ()),
        )  # fmt: skip

    def drawing_flops(self, model: TarFlowConfig) -> tuple[float, float]:
        """FLOPs of (sampling, denoising). Guidance computes a second, unconditional row for each image, block by block."""
        sampling = self.samples * sampling_flops(model, self.guided, self.guide_blocks)
        return sampling, self.samples * denoising_flops(model) * self.denoised

    def likelihood_flops(self, model: TarFlowConfig) -> float:
        """FLOPs of the forward passes over held-out images."""
        return self.held_out * self.draws * flops_per_image(model, training=False)


@dataclass(frozen=True)
class Rate:
    """How fast one worker is: FLOP/s while it draws and while it takes likelihoods, and seconds beside them."""

    drawing: float
    likelihood: float
    source: str
    beside: float = 0.0  # seconds per sample: features and their statistics
    once: float = 0.0  # seconds per result

    @classmethod
    def stated(cls, tera: float) -> "Rate":
        """A rate in TFLOP/s for everything; features are left out, and the text says so."""
        return cls(tera * 1e12, tera * 1e12, f"{tera:g} TFLOP/s per worker (--rate), without the feature network")

    @classmethod
    def measured(cls, found: Iterable[tuple[Path, dict[str, Any]]], model: TarFlowConfig) -> "Rate | None":
        """That of the newest result which recorded its times; None if there is none."""
        timed = [(path, one) for path, one in found if one["seconds"].get("sampling") and one["step"] is not None]
        if not timed:
            return None
        path, result = max(timed, key=lambda item: item[1].get("time", 0.0))
        seconds, work = result["seconds"], Work.of_result(result)
        drawing = sum(work.drawing_flops(model)) / seconds["sampling"]
        likelihood = work.likelihood_flops(model) / seconds["likelihood"] if seconds.get("likelihood") else drawing
        device = (result.get("machine") or {}).get("device", "an unknown device")
        return cls(
            drawing, likelihood or drawing, f"{drawing / 1e12:.3g} TFLOP/s per worker, as measured in {path.name} on {device}",
            sum(seconds.get(name, 0.0) for name in _BESIDE) / max(work.samples, 1),
            sum(seconds.get(name, 0.0) for name in _ONCE),
        )  # fmt: skip

    def hours(self, work: Work, model: TarFlowConfig) -> float:
        """Hours of one worker."""
        seconds = sum(work.drawing_flops(model)) / self.drawing + work.likelihood_flops(model) / self.likelihood
        return (seconds + self.beside * work.samples + self.once) / 3600


@dataclass
class Estimate:
    """The evaluations that are to be done: each recipe, with the names of what has no result under it."""

    waiting: Sequence[tuple[Recipe, Sequence[str]]]
    rate: Rate | None
    workers: int = 1
    lines: list[str] = field(default_factory=list)

    def text(self) -> str:
        """One paragraph for each recipe, and the sum of those that wait."""
        model = self.waiting[0][0].config.model
        total = 0.0
        for recipe, names in self.waiting:
            work = Work.of_recipe(recipe)
            self.lines += _describe(recipe, work, names)
            if self.rate is not None:
                hours = self.rate.hours(work, model)
                total += hours * len(names)
                self.lines.append(
                    f"  time        {_hours(hours)} of one worker each, {_hours(hours * len(names))} in all"
                )
        evaluations = sum(len(names) for _, names in self.waiting)
        if self.rate is None:
            self.lines.append(
                "time        not known: no result of this run recorded its times; give --rate TFLOPS, what one device sustains"
            )
        else:
            self.lines.append(f"rate        {self.rate.source}")
            shared = f", {_hours(total / self.workers)} for {self.workers} workers" if self.workers > 1 else ""
            what = "evaluation" if evaluations == 1 else "evaluations"
            self.lines.append(f"in all      {evaluations} {what}: {_hours(total)} of one worker{shared}")
        return "\n".join(self.lines)


def measured_rate(root: Path, model: TarFlowConfig) -> Rate | None:
    """The rate in the results of a run, or of the folder that holds a weights file's."""
    return Rate.measured(results.read_results(root), model)


def _describe(recipe: Recipe, work: Work, names: Sequence[str]) -> list[str]:
    model, settings = recipe.config.model, recipe.settings
    which = "the last checkpoint" if recipe.final else "each checkpoint"
    what = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"
    blocks = len({number % model.num_blocks for number in work.guide_blocks}) or model.num_blocks
    rows, guided = work.samples, ""
    if work.guided and blocks == model.num_blocks:
        rows, guided = 2 * rows, ", guided: two rows each"
    elif work.guided:
        guided = f", guided, with two rows each, in {blocks} of {model.num_blocks} blocks"
    sampling, denoising = work.drawing_flops(model)
    passes = work.held_out * work.draws
    lines = [
        f"{which} with weights {settings.weights}, settings {settings.hash}: {what} to evaluate",
        f"  sampling    {work.samples:,} images{guided}; {rows * model.num_tokens:,} tokens; {sampling:.3g} FLOP",
    ]
    if work.denoised:
        lines.append(
            f"  denoising   {work.samples:,} images{f' x {work.denoised} steps' if work.denoised > 1 else ''}; "
            f"{work.samples * work.denoised * model.num_tokens:,} tokens; {denoising:.3g} FLOP"
        )
    if work.held_out:
        lines.append(
            f"  likelihood  {work.held_out:,} held-out images x {work.draws} draws; {passes * model.num_tokens:,} tokens; "
            f"{work.likelihood_flops(model):.3g} FLOP"
        )
    return lines


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
