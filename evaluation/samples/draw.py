"""Images from the model: guided, denoised, checked, rounded to 8 bits.

Sample i depends on (seed, i) alone: it is the same image in any batch, on any number of workers, in any order. A sample
that is not finite in bfloat16 is drawn again in float32; if it still is not, it is counted and dropped, never turned into
pixels.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow.evaluation.batches import DENOISING, SAMPLING, Batches
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log
from tarflow.evaluation.metrics.certificates import Certificates
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import denoising_bytes
from tarflow.models.denoise import denoise, denoise_in_steps, flow_score, schedule
from tarflow.models.float32 import products
from tarflow.models.flow import TarFlow
from tarflow.models.noise import to_pixels
from tarflow.models.randomness import keyed_normal, keyed_uniform
from tarflow.models.sampling import native
from tarflow.models.sampling.inverse import Sampled, invert, together
from tarflow.models.sampling.measure import measure_plan
from tarflow.models.sampling.plan import SamplingPlan, conditions_of, plan_without_measuring
from tarflow.models.sampling.settings import SamplingSettings

STREAM = "sample"
NO_LABEL = -1


@dataclass
class Drawn:
    """A batch of samples. Images are float32 in model range on the CPU, not clipped."""

    indices: list[int]
    labels: Tensor  # [n] int64, -1 = no label
    noisy: Tensor  # [n, C, H, W] as sampled
    images: Tensor  # [n, C, H, W] after denoising
    finite: Tensor  # [n] bool: usable
    retried: int  # drawn again in float32
    trajectory: list[Tensor] = field(default_factory=list)  # [n, C, H, W] after 0, 1, ... blocks, if asked for
    denoising: list[Tensor] = field(default_factory=list)  # [n, C, H, W] after 0, 1, ... steps of several, if asked for
    certificate: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # [n, blocks], see `models.sampling.paths`
    redone: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))  # [n]: token by token after all

    def pixels(self) -> Tensor:
        """uint8 [m, C, H, W] of the m finite samples, as a PNG stores them."""
        return to_pixels(self.images[self.finite])

    def finite_indices(self) -> list[int]:
        """Indices of the finite samples, in the order of `pixels`."""
        return [index for index, good in zip(self.indices, self.finite.tolist()) if good]


class Sampler:
    """Draws samples of one model with fixed settings. `batches`: the memory that it shares with other stages."""

    def __init__(self, model: TarFlow, sampling: ResolvedSampling, batches: Batches | None = None) -> None:
        self.model = model.eval()
        self.batches = batches or Batches(model.var.device)
        self.sampling = sampling
        self._fast = self._in_dtype(sampling.settings.param_dtype)
        classes = model.config.num_classes
        for label in sampling.labels:
            if not NO_LABEL <= label < classes:
                known = f"0..{classes - 1}, or -1 for no label" if classes else "it has no classes: leave labels out"
                raise EvaluationError(f"label {label} is not one of the model's {classes} classes ({known})")
        self.plan: SamplingPlan | None = None  # of method auto, until it is measured or taken over from another worker
        if sampling.settings.method != "auto":
            self.plan = plan_without_measuring(model.config, sampling.settings)

    def measure(self, indices: Sequence[int], weights: str = "", log: Log | None = None) -> SamplingPlan:
        """The plan of method auto, measured on a batch of these samples; `weights`: their hash."""
        block: Any = self.model.blocks[0]
        if log and (problem := native.why_not(block)):
            log(f"the compiled sampler is not used, torch serves: {problem}")
        with products(self.sampling.matmul_precision):
            return measure_plan(self.model, *self._inputs(indices), self.sampling.settings, weights)

    def take_over(self, plan: SamplingPlan, weights: str = "") -> None:
        """Sample by a plan. Raises ModelError for one that was made under other conditions."""
        plan.check(conditions_of(self.model.config, self.sampling.settings, weights))
        self.plan = plan

    def _inputs(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Noise and labels on the model's device; None for a model without classes."""
        device = self.model.var.device
        labels = self.labels(indices).to(device) if self.model.config.num_classes else None
        return self.noise(indices).to(device), labels

    def _certified(self, indices: Sequence[int]) -> Tensor:
        """Whose certificate is wanted although the path gives none: by index, so that no batch changes it."""
        every = self.sampling.settings.certify_every
        return torch.tensor([bool(every) and index % every == 0 for index in indices])

    def _in_dtype(self, param_dtype: str) -> TarFlow:
        if param_dtype == "float32":
            return self.model
        fast = copy.deepcopy(self.model).to(torch.bfloat16)
        fast.var = self.model.var  # the prior is part of the flow, which runs in float32
        return fast

    def label_of(self, index: int) -> int:
        """The label of sample i: listed, drawn by frequency, or balanced; -1 for a model without classes."""
        sampling = self.sampling
        if sampling.labels:
            return sampling.labels[index % len(sampling.labels)]
        if sampling.class_counts:
            u = float(keyed_uniform(sampling.settings.seed, f"{STREAM}/label", 0, [index], ()))
            shares = np.cumsum(sampling.class_counts) / sum(sampling.class_counts)
            return int(np.searchsorted(shares, u, side="right"))
        classes = self.model.config.num_classes
        return index % classes if classes else NO_LABEL

    def noise(self, indices: Sequence[int]) -> Tensor:
        """[n, T, D], normal of standard deviation `temperature`; row i belongs to sample indices[i]."""
        return self.candidate_noise(indices, 0)

    def candidate_noise(self, indices: Sequence[int], candidate: int) -> Tensor:
        """The same for one of any number of candidates for each sample; the samples themselves are number 0."""
        config, settings = self.model.config, self.sampling.settings
        drawn = keyed_normal(settings.seed, STREAM, candidate, indices, (config.num_tokens, config.token_dim))
        return drawn * settings.temperature

    def labels(self, indices: Sequence[int]) -> Tensor:
        """int64 [n], -1 = no label."""
        return torch.tensor([self.label_of(i) for i in indices], dtype=torch.int64)

    def draw(self, indices: Sequence[int], with_trajectory: bool = False) -> Drawn:
        """The samples of these indices, in one batch as far as memory goes."""
        with products(self.sampling.matmul_precision):
            return self._draw(indices, with_trajectory)

    def _draw(self, indices: Sequence[int], with_trajectory: bool) -> Drawn:
        labels, certified = self.labels(indices), self._certified(indices)
        noise, y = self._inputs(indices)
        done = self._sampled(self._fast, noise, y, certified, with_trajectory)
        noisy = done.images

        # bfloat16 can overflow in exp(a) where float32 does not: only the samples that did are drawn again.
        bad = ~_finite(noisy)
        retried = int(bad.sum()) if self._fast is not self.model else 0
        if retried:
            again = self._sampled(self.model, noise[bad], None if y is None else y[bad], certified[bad.cpu()])
            noisy[bad], done.certificate[bad.cpu()] = again.images, again.certificate

        # The score is always that of the float32 network; the step can overflow too, so its result is checked as well.
        images, states = noisy, []
        if self.sampling.settings.steps:
            images, *states = self._denoised_in_steps(noisy, y, indices, with_trajectory)
        elif self.sampling.denoise_multiplier:
            images = self._denoised(noisy, y)
        finite = _finite(noisy) & _finite(images)
        return Drawn(
            list(indices), labels, noisy.cpu(), images.detach().cpu(), finite.cpu(), retried, done.trajectory,
            states, done.certificate, done.redone.any(1),
        )  # fmt: skip

    def _sampled(
        self, model: TarFlow, noise: Tensor, y: Tensor | None, certified: Tensor, with_trajectory: bool = False
    ) -> Sampled:
        """Images [N, C, H, W] before denoising, and after 0, 1, ... blocks if asked for."""
        settings, judge = self.sampling.settings, None if model is self.model else self.model

        def compute(part: slice) -> Sampled:
            labels = None if y is None else y[part]
            if self.plan is None:
                self.plan = measure_plan(self.model, noise[part], labels, settings)
            return invert(model, noise[part], labels, settings, self.plan, certified[part], judge, with_trajectory)

        return together(self.batches.run(SAMPLING, len(noise), compute))

    def _denoised(self, noisy: Tensor, y: Tensor | None) -> Tensor:
        """The images after the denoising step, which takes more memory than sampling and so has a batch of its own."""
        sampling = self.sampling

        def compute(part: slice) -> Tensor:
            labels = None if y is None else y[part]
            return denoise(self.model, noisy[part], labels, sampling.noise_std, sampling.denoise_multiplier)

        return torch.cat(self.batches.run(DENOISING, len(noisy), compute, denoising_bytes(self.model.config)))

    def _denoised_in_steps(
        self, noisy: Tensor, y: Tensor | None, indices: Sequence[int], with_states: bool
    ) -> list[Tensor]:
        """The images after the last step of iterative denoising; with_states: and after 0, 1, ... steps, on the CPU."""
        settings, shape = self.sampling.settings, self.model.config.image_shape
        levels = levels_of(settings)

        def compute(part: slice) -> list[Tensor]:
            def fresh(number: int) -> Tensor:
                return keyed_normal(settings.seed, f"{STREAM}/denoise", number, indices[part], shape).to(noisy.device)

            score, states = flow_score(self.model, None if y is None else y[part]), list[Tensor]()
            images = denoise_in_steps(
                noisy[part],
                levels,
                score,
                fresh if settings.denoise_stochastic else None,
                states if with_states else None,
            )
            return [images, *(state.cpu() for state in states)]

        parts = self.batches.run(DENOISING, len(noisy), compute, denoising_bytes(self.model.config))
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    def draw_all(self, indices: Sequence[int], batch_size: int) -> Iterator[Drawn]:
        """Yield the samples of these indices in batches."""
        for start in range(0, len(indices), batch_size):
            yield self.draw(indices[start : start + batch_size])


def levels_of(settings: SamplingSettings) -> list[float]:
    """The noise levels of iterative denoising, from t1 to 0; t1 alone where it is off."""
    assert settings.noise_level is not None
    if not settings.steps:
        return [settings.noise_level]
    low = settings.noise_level if settings.denoise_to is None else settings.denoise_to
    return schedule(settings.noise_level, low, settings.steps, settings.denoise_schedule)


def _finite(images: Tensor) -> Tensor:
    return torch.isfinite(images).flatten(1).all(dim=1)


@dataclass
class SampleCount:
    """How many samples were requested, used and dropped; recorded in the result."""

    asked: int = 0
    used: int = 0
    retried_in_float32: int = 0
    values: int = 0
    values_out_of_range: int = 0
    nonfinite: list[int] = field(default_factory=list)
    redone: int = 0  # token by token, where another path did not get there
    certificates: Certificates = field(default_factory=Certificates)

    def add(self, drawn: Drawn) -> None:
        """Count a batch."""
        self.asked += len(drawn.indices)
        self.used += int(drawn.finite.sum())
        self.retried_in_float32 += drawn.retried
        self.nonfinite += [i for i, good in zip(drawn.indices, drawn.finite.tolist()) if not good]
        self.redone += int(drawn.redone.sum())
        self.certificates.add(drawn.indices, drawn.certificate)
        good_images = drawn.images[drawn.finite]
        self.values += good_images.numel()
        self.values_out_of_range += int((good_images.abs() > 1).sum())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The counts as arrays, for the file of a chunk."""
        sums = [self.asked, self.used, self.retried_in_float32, self.values, self.values_out_of_range]
        found = {"sums": sums, "nonfinite": self.nonfinite, "redone": [self.redone]}
        return {name: np.array(value, dtype=np.int64) for name, value in found.items()} | self.certificates.arrays()

    def merge(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Add another chunk's `arrays`."""
        asked, used, retried, values, out_of_range = arrays["sums"].tolist()
        self.asked += asked
        self.used += used
        self.retried_in_float32 += retried
        self.values += values
        self.values_out_of_range += out_of_range
        self.nonfinite += arrays["nonfinite"].tolist()
        if "redone" in arrays:  # else a version without other paths wrote it
            self.redone += int(arrays["redone"][0])
            self.certificates.merge(arrays)

    @property
    def nonfinite_share(self) -> float:
        """Fraction of the requested samples that are not finite."""
        return len(self.nonfinite) / max(self.asked, 1)

    def describe(self) -> dict[str, Any]:
        """Plain values for result files. Rounding to 8 bits clamps values beyond [-1, 1]: their fraction is included."""
        return {
            "asked": self.asked,
            "used": self.used,
            "nonfinite": len(self.nonfinite),
            "nonfinite_share": self.nonfinite_share,
            "nonfinite_indices": self.nonfinite[:100],
            "retried_in_float32": self.retried_in_float32,
            "redone_sequentially": self.redone,
            "certificate": self.certificates.describe(),
            "clamped_value_share": self.values_out_of_range / max(self.values, 1),
        }

    def problem(self, max_share: float) -> str | None:
        """Why these samples must not be scored, or None."""
        if self.nonfinite_share <= max_share:
            return None
        return (
            f"{len(self.nonfinite)} of {self.asked} samples are not finite ({self.nonfinite_share:.1%}, at most "
            f"{max_share:.1%} may be): samples {self.nonfinite[:10]}. Try sampling.param_dtype=float32, a lower "
            "sampling.guidance, weights of another average, a higher sampling.denoise_to (of a model with noise_conditioning), "
            "or train with model.soft_clip=4 or model.scale=softplus"
        )


def check_noise(sampling: ResolvedSampling, model: TarFlowConfig, bounds: tuple[float, float] | None) -> None:
    """Raise EvaluationError for noise levels that the model cannot be sampled at. `bounds`: of training; None if unknown."""
    problem = sampling.settings.noise_problem(model.noise_conditioning, bounds)
    if problem is not None:
        raise EvaluationError(problem)
    if model.noise_conditioning and sampling.settings.noise_level is None:
        raise EvaluationError(
            "the weights do not record the noise levels that they were trained on, and a model with noise_conditioning is "
            "sampled at one of them: give it (noise_std, --noise-std)"
        )


def check_guidance(sampling: ResolvedSampling, model: TarFlowConfig, label_dropout: float | None) -> None:
    """Raise EvaluationError for guidance that this model cannot have, or that means nothing.

    `label_dropout` is None if unknown.
    """
    labelled = model.num_classes > 0 and set(sampling.labels) != {NO_LABEL}
    settings = sampling.settings
    problem = settings.blocks_problem(model.num_blocks) or settings.guidance_problem(labelled, label_dropout)
    if problem is not None:
        raise EvaluationError(problem)
