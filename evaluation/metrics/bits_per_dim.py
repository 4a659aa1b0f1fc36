"""Bits per dimension of held-out images, with the noise that the model was trained on.

The noise of an image is keyed by (seed, stream, draw, sample id): batch size, order and number of workers do not change
the result. Several draws of the noise per image are averaged; the standard error is over images. After uniform
dequantisation the importance-weighted bound is computed too (Ho et al., arXiv 1902.00275, section 3.1; Burda et al.,
arXiv 1509.00519, equation 8): it lies between the average and the likelihood of the 8-bit image itself.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tarflow.evaluation.batches import LIKELIHOOD, Batches
from tarflow.evaluation.errors import EvaluationError
from tarflow.models.cost import likelihood_bytes
from tarflow.models.float32 import TRUE_FLOAT32, products
from tarflow.models.flow import TarFlow
from tarflow.models.likelihood import bits_per_dim
from tarflow.models.noise import add_noise
from tarflow.models.randomness import keyed_normal, keyed_uniform

STREAM = "evaluation/likelihood"
BINS = 40  # of the histogram over images


@dataclass(frozen=True)
class NoiseSettings:
    """The noise added to 8-bit images before their likelihood is taken."""

    kind: Literal["gaussian", "uniform"]
    std: float  # of gaussian noise, in model range
    seed: int = 0
    draws: int = 1  # per image
    told: bool = False  # the model is told `std` as the noise level of its images

    def describe(self) -> str:
        """For results: bits per dimension compare only under the same noise."""
        draws = f"seed {self.seed}" + (f", {self.draws} draws" if self.draws > 1 else "")
        if self.kind == "uniform":
            return f"uniform dequantisation, {draws}"
        told = ", told to the model" if self.told else ""
        return f"gaussian, standard deviation {self.std:g} in [-1, 1]{told}, {draws}"

    def levels(self, images: Tensor) -> Tensor | None:
        """What the model is told of so many images: noise levels [N] on their device; None where it is told nothing."""
        return torch.full((len(images),), self.std, device=images.device) if self.told else None

    def apply(self, pixels: Tensor, ids: list[int], draw: int = 0) -> Tensor:
        """uint8 [N, C, H, W] with sample ids -> float32 in model range with the noise of each sample and draw."""
        generate = keyed_uniform if self.kind == "uniform" else keyed_normal
        return add_noise(pixels, generate(self.seed, STREAM, draw, ids, tuple(pixels.shape[1:])), self.kind, self.std)


@dataclass
class BitsPerDim:
    """The bits per dimension of every image under every draw of its noise, by sample id, in float64."""

    noise: NoiseSettings
    dims: int = 0  # values per image
    values: dict[int, list[float]] = field(default_factory=dict)

    @torch.inference_mode()
    def add(self, model: TarFlow, pixels: Tensor, labels: Tensor, ids: Tensor, batches: Batches | None = None) -> None:
        """Images uint8 [N, C, H, W], labels [N] (-1 = none), ids [N]. An id that was added before is an error.

        `batches`: the memory that is shared with other stages; it decides how many images a forward pass takes.
        """
        names = [int(i) for i in ids]
        device = model.var.device
        batches = batches or Batches(device)
        y = labels.to(device) if model.config.num_classes else None
        drawn = []
        for draw in range(self.noise.draws):
            noisy = self.noise.apply(pixels, names, draw)

            def compute(part: slice, noisy: Tensor = noisy) -> list[float]:
                with products(TRUE_FLOAT32):
                    x = noisy[part].to(device)
                    one = bits_per_dim(model, x, None if y is None else y[part], self.noise.levels(x))
                return list(one.double().tolist())

            parts = batches.run(LIKELIHOOD, len(names), compute, likelihood_bytes(model.config))
            drawn.append([value for part in parts for value in part])
        self.put(names, [list(values) for values in zip(*drawn)], pixels[0].numel())

    def put(self, names: Iterable[int], values: Iterable[list[float]], dims: int) -> None:
        """Add the values of images: one list per image, a value per draw."""
        self.dims = dims
        for name, row in zip(names, values):
            if name in self.values:
                raise EvaluationError(f"sample {name} of the held-out images was added twice")
            self.values[name] = row

    def merge(self, other: "BitsPerDim") -> None:
        """Add the images of another worker."""
        self.put(other.values, other.values.values(), other.dims or self.dims)

    def result(self) -> dict[str, Any]:
        """Mean and standard error over images, summed by sample id; an infinite likelihood is counted, not averaged.

        `importance_weighted`: bits per dimension of log (1/K) sum_k p(x + u_k), K draws u of uniform noise; None for
        gaussian noise, which is not a dequantisation and gives no bound.
        """
        # In the order of ids and with exact sums: the same bits for any number of workers.
        rows = [self.values[i] for i in sorted(self.values)]
        means = [math.fsum(row) / len(row) for row in rows]
        count = sum(math.isfinite(mean) for mean in means)
        out: dict[str, Any] = {
            "bits_per_dim": None,
            "stderr": None,
            "importance_weighted": None,
            "images": len(rows),
            "draws": self.noise.draws,
            "nonfinite": len(rows) - count,
            "noise": self.noise.describe(),
        }
        if count == len(rows) > 0:
            mean = math.fsum(means) / count
            spread = math.fsum((v - mean) ** 2 for v in means)
            out["bits_per_dim"] = mean
            out["stderr"] = math.sqrt(spread / (count - 1) / count) if count > 1 else None
            if self.noise.kind == "uniform":
                out["importance_weighted"] = math.fsum(self._weighted(row) for row in rows) / count
        return out

    def histogram(self) -> dict[str, Any] | None:
        """Images by their bits per dimension: `from`, `to` and the `counts` of `BINS` equal bins; None without a finite one."""
        means = [math.fsum(row) / len(row) for row in self.values.values()]
        finite = [mean for mean in means if math.isfinite(mean)]
        if not finite:
            return None
        low, high = min(finite), max(finite)
        width = (high - low) / BINS or 1 / BINS
        counts = [0] * BINS
        for mean in finite:
            counts[min(int((mean - low) / width), BINS - 1)] += 1
        return {"from": low, "to": low + BINS * width, "counts": counts}

    def _weighted(self, row: list[float]) -> float:
        """Bits per dimension of the mean density of the draws. The sum is taken relative to the most likely draw."""
        best = min(row)
        share = math.fsum(2 ** ((best - bits) * self.dims) for bits in row) / len(row)
        return best - math.log2(share) / self.dims


def measure_bits_per_dim(
    model: TarFlow, batches: Iterable[tuple[Tensor, Tensor, Tensor]], noise: NoiseSettings
) -> dict[str, Any]:
    """(pixels, labels, ids) batches -> `BitsPerDim.result`."""
    measured = BitsPerDim(noise)
    for pixels, labels, ids in batches:
        measured.add(model, pixels, labels, ids)
    if not measured.values:
        raise EvaluationError("there are no held-out images: data.validation is empty")
    return measured.result()
