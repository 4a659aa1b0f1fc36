"""Bits per dimension of held-out images, with the noise that the model was trained on.

The noise of an image is keyed by (seed, stream, sample id): batch size, order and number of workers do not change the
figure. One draw of the noise per image; the standard error is over images.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evaluation.errors import EvaluationError
from models.flow import TarFlow
from models.likelihood import bits_per_dim
from models.noise import add_noise
from models.randomness import keyed_normal, keyed_uniform

STREAM = "evaluation/likelihood"


@dataclass(frozen=True)
class NoiseSettings:
    """The noise added to 8-bit images before their likelihood is taken."""

    kind: str  # "gaussian" or "uniform"
    std: float  # of gaussian noise, in model range
    seed: int = 0

    def describe(self) -> str:
        """For results: two figures compare only under the same noise."""
        if self.kind == "uniform":
            return f"uniform dequantisation, seed {self.seed}"
        return f"gaussian, standard deviation {self.std:g} in [-1, 1], seed {self.seed}"

    def apply(self, pixels: Tensor, ids: list[int]) -> Tensor:
        """uint8 [N, C, H, W] with sample ids -> float32 in model range with each sample's own noise."""
        draw = keyed_uniform if self.kind == "uniform" else keyed_normal
        return add_noise(pixels, draw(self.seed, STREAM, 0, ids, tuple(pixels.shape[1:])), self.kind, self.std)


@dataclass
class BitsPerDim:
    """The bits per dimension of every image, by sample id, in float64."""

    noise: NoiseSettings
    values: dict[int, float] = field(default_factory=dict)

    @torch.inference_mode()
    def add(self, model: TarFlow, pixels: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Images uint8 [N, C, H, W], labels [N] (-1 = none), ids [N]. An id that was there already is an error."""
        names = [int(i) for i in ids]
        device = model.var.device
        noisy = self.noise.apply(pixels, names).to(device)
        y = labels.to(device) if model.config.num_classes else None
        for name, value in zip(names, bits_per_dim(model, noisy, y).double().tolist()):
            if name in self.values:
                raise EvaluationError(f"sample {name} of the held-out images came twice")
            self.values[name] = value

    def merge(self, other: "BitsPerDim") -> None:
        """Take in what another worker did."""
        self.values |= other.values

    def result(self) -> dict[str, Any]:
        """Mean and standard error over images, summed by sample id; an infinite likelihood is said, not averaged."""
        values = [self.values[i] for i in sorted(self.values)]
        good = [v for v in values if math.isfinite(v)]
        count = len(good)
        out: dict[str, Any] = {
            "bits_per_dim": None,
            "stderr": None,
            "images": len(values),
            "nonfinite": len(values) - count,
            "noise": self.noise.describe(),
        }
        if count == len(values) > 0:
            mean = math.fsum(good) / count
            spread = math.fsum((v - mean) ** 2 for v in good)
            out["bits_per_dim"] = mean
            out["stderr"] = math.sqrt(spread / (count - 1) / count) if count > 1 else None
        return out


def measure_bits_per_dim(
    model: TarFlow, batches: Iterable[tuple[Tensor, Tensor, Tensor]], noise: NoiseSettings
) -> dict[str, Any]:
    """(pixels, labels, ids) batches -> bits_per_dim, stderr, images, nonfinite, noise (see `BitsPerDim.result`)."""
    measured = BitsPerDim(noise)
    for pixels, labels, ids in batches:
        measured.add(model, pixels, labels, ids)
    if not measured.values:
        raise EvaluationError("there are no held-out images: data.validation is empty")
    return measured.result()
