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
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.models.cost import denoising_bytes
from tarflow.models.denoise import denoise
from tarflow.models.flow import TarFlow
from tarflow.models.noise import to_pixels
from tarflow.models.randomness import keyed_normal, keyed_uniform
from tarflow.models.sampling.sequential import sample

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
        """Standard normal [n, T, D]; row i belongs to sample indices[i]."""
        config = self.model.config
        return keyed_normal(self.sampling.settings.seed, STREAM, 0, indices, (config.num_tokens, config.token_dim))

    def labels(self, indices: Sequence[int]) -> Tensor:
        """int64 [n], -1 = no label."""
        return torch.tensor([self.label_of(i) for i in indices], dtype=torch.int64)

    def draw(self, indices: Sequence[int], with_trajectory: bool = False) -> Drawn:
        """The samples of these indices, in one batch as far as memory goes."""
        settings, device = self.sampling.settings, self.model.var.device
        noise, labels = self.noise(indices).to(device), self.labels(indices)
        y = labels.to(device) if self.model.config.num_classes else None
        noisy, trajectory = self._sampled(noise, y, with_trajectory)

        # bfloat16 can overflow in exp(a) where float32 does not: only the samples that did are drawn again.
        bad = ~_finite(noisy)
        retried = int(bad.sum()) if self._fast is not self.model else 0
        if retried:
            noisy[bad] = sample(self.model, noise[bad], None if y is None else y[bad], settings)

        # The score is always that of the float32 network; the step can overflow too, so its result is checked as well.
        images = noisy
        if self.sampling.denoise_multiplier:
            images = self._denoised(noisy, y)
        finite = _finite(noisy) & _finite(images)
        return Drawn(list(indices), labels, noisy.cpu(), images.detach().cpu(), finite.cpu(), retried, trajectory)

    def _sampled(self, noise: Tensor, y: Tensor | None, with_trajectory: bool) -> tuple[Tensor, list[Tensor]]:
        """Images [N, C, H, W] before denoising, and after 0, 1, ... blocks if asked for."""
        settings = self.sampling.settings

        def compute(part: slice) -> tuple[Tensor, list[Tensor]]:
            labels = None if y is None else y[part]
            if with_trajectory:
                return sample(self._fast, noise[part], labels, settings, return_trajectory=True)
            return sample(self._fast, noise[part], labels, settings), []

        parts = self.batches.run(SAMPLING, len(noise), compute)
        # Copies made outside inference mode: denoising takes the gradient at these images.
        trajectory = [torch.cat(steps) for steps in zip(*(steps for _, steps in parts), strict=True)]
        return torch.cat([images for images, _ in parts]), trajectory

    def _denoised(self, noisy: Tensor, y: Tensor | None) -> Tensor:
        """The images after the denoising step, which takes more memory than sampling and so has a batch of its own."""
        sampling = self.sampling

        def compute(part: slice) -> Tensor:
            labels = None if y is None else y[part]
            return denoise(self.model, noisy[part], labels, sampling.noise_std, sampling.denoise_multiplier)

        return torch.cat(self.batches.run(DENOISING, len(noisy), compute, denoising_bytes(self.model.config)))

    def draw_all(self, indices: Sequence[int], batch_size: int) -> Iterator[Drawn]:
        """Yield the samples of these indices in batches."""
        for start in range(0, len(indices), batch_size):
            yield self.draw(indices[start : start + batch_size])


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

    def add(self, drawn: Drawn) -> None:
        """Count a batch."""
        self.asked += len(drawn.indices)
        self.used += int(drawn.finite.sum())
        self.retried_in_float32 += drawn.retried
        self.nonfinite += [i for i, good in zip(drawn.indices, drawn.finite.tolist()) if not good]
        good_images = drawn.images[drawn.finite]
        self.values += good_images.numel()
        self.values_out_of_range += int((good_images.abs() > 1).sum())

    def arrays(self) -> dict[str, NDArray[np.int64]]:
        """The counts as arrays, for the file of a chunk."""
        sums = [self.asked, self.used, self.retried_in_float32, self.values, self.values_out_of_range]
        return {"sums": np.array(sums, dtype=np.int64), "nonfinite": np.array(self.nonfinite, dtype=np.int64)}

    def merge(self, arrays: dict[str, NDArray[np.int64]]) -> None:
        """Add another chunk's `arrays`."""
        asked, used, retried, values, out_of_range = arrays["sums"].tolist()
        self.asked += asked
        self.used += used
        self.retried_in_float32 += retried
        self.values += values
        self.values_out_of_range += out_of_range
        self.nonfinite += arrays["nonfinite"].tolist()

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
            "clamped_value_share": self.values_out_of_range / max(self.values, 1),
        }

    def problem(self, max_share: float) -> str | None:
        """Why these samples must not be scored, or None."""
        if self.nonfinite_share <= max_share:
            return None
        return (
            f"{len(self.nonfinite)} of {self.asked} samples are not finite ({self.nonfinite_share:.1%}, at most "
            f"{max_share:.1%} may be): samples {self.nonfinite[:10]}. Try sampling.param_dtype=float32, a lower "
            "sampling.guidance, weights of another average, or train with model.soft_clip=4"
        )


def check_guidance(sampling: ResolvedSampling, num_classes: int, label_dropout: float | None) -> None:
    """Raise EvaluationError for guidance that would be meaningless. `label_dropout` is None if unknown."""
    labelled = num_classes > 0 and set(sampling.labels) != {NO_LABEL}
    problem = sampling.settings.guidance_problem(labelled, label_dropout)
    if problem is not None:
        raise EvaluationError(problem)
