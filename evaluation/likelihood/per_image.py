"""The likelihood of every image: by draw of the noise, and by what the prior and each block contribute.

In bits per dimension of 8-bit data, by the change of variables (arXiv 2412.06329, section 2.1),

    bits = [energy of z / ln 2 + 7] - sum over blocks of [log-determinant / ln 2],

where the first bracket is the prior's part and each term of the sum a block's. The noise is that of `metrics.bits_per_dim`,
keyed by the image's number: the mean over a data set is the figure that an evaluation reports.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow.evaluation.batches import LIKELIHOOD, Batches
from tarflow.evaluation.metrics.bits_per_dim import NoiseSettings
from tarflow.models.cost import likelihood_bytes
from tarflow.models.float32 import TRUE_FLOAT32, products
from tarflow.models.flow import TarFlow
from tarflow.models.likelihood import bits_from_density, log_density

Floats = NDArray[np.float64]


@dataclass
class ImageLikelihoods:
    """Arrays over images.

    `parts`: the prior's share and each block's, the mean over draws; a row's sum is the image's bits per dimension.
    """

    ids: NDArray[np.int64]  # [n], ascending
    labels: NDArray[np.int64]  # [n], -1 = none
    bits: Floats  # [n, draws] bits per dimension
    parts: Floats  # [n, 1 + blocks]

    @classmethod
    def joined(cls, parts: Iterable["ImageLikelihoods"]) -> "ImageLikelihoods":
        """All of them, sorted by number."""
        every = list(parts)
        ids = np.concatenate([part.ids for part in every])
        order = np.argsort(ids, kind="stable")
        labels = np.concatenate([part.labels for part in every])
        bits, shares = np.concatenate([part.bits for part in every]), np.concatenate([part.parts for part in every])
        return cls(ids[order], labels[order], bits[order], shares[order])

    def only(self, ids: NDArray[np.int64]) -> "ImageLikelihoods":
        """Those of some numbers, which must be there, in their order."""
        rows = np.searchsorted(self.ids, ids)
        return ImageLikelihoods(self.ids[rows], self.labels[rows], self.bits[rows], self.parts[rows])

    @property
    def mean(self) -> Floats:
        """[n] bits per dimension, the mean over draws."""
        return np.array([math.fsum(row) / len(row) for row in self.bits.tolist()])

    @property
    def stderr(self) -> Floats | None:
        """[n] standard error of that mean over the draws; None of a single draw."""
        draws = self.bits.shape[1]
        return np.asarray(self.bits.std(axis=1, ddof=1) / math.sqrt(draws)) if draws > 1 else None

    def importance_weighted(self, dims: int) -> Floats:
        """[n] bits per dimension of the mean density over the draws: a bound that rises with them (arXiv 1509.00519)."""
        best = self.bits.min(axis=1, keepdims=True)
        share = np.exp2((best - self.bits) * dims).mean(axis=1)
        return np.asarray(best[:, 0] - np.log2(share) / dims)


@torch.inference_mode()
def likelihoods(
    model: TarFlow,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    noise: NoiseSettings,
    memory: Batches | None = None,
) -> ImageLikelihoods:
    """Batches (pixels uint8 [n, C, H, W], labels [n], numbers [n]) -> the likelihood of every image.

    `memory` decides how many images of a batch a forward pass takes.
    """
    device, shares = model.var.device, 1 + len(model.blocks)
    memory = memory or Batches(device)
    found = [
        ImageLikelihoods(
            np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, noise.draws)), np.zeros((0, shares))
        )
    ]
    for pixels, labels, ids in batches:
        y = labels.to(device) if model.config.num_classes else None
        drawn = []
        for draw in range(noise.draws):
            noisy = noise.apply(pixels, ids.tolist(), draw)

            def compute(rows: slice, noisy: Tensor = noisy, y: Tensor | None = y) -> tuple[Floats, Floats]:
                with products(TRUE_FLOAT32):
                    x = noisy[rows].to(device)
                    return _of_draw(model, x, None if y is None else y[rows], noise.levels(x))

            parts = memory.run(LIKELIHOOD, len(ids), compute, likelihood_bytes(model.config))
            drawn.append((np.concatenate([values for values, _ in parts]), np.concatenate([part for _, part in parts])))
        bits = np.stack([values for values, _ in drawn], axis=1)
        found.append(ImageLikelihoods(ids.numpy(), labels.numpy(), bits, np.mean([part for _, part in drawn], axis=0)))
    return ImageLikelihoods.joined(found)


def _of_draw(model: TarFlow, images: Tensor, y: Tensor | None, noise: Tensor | None) -> tuple[Floats, Floats]:
    """Bits per dimension [n], to the bits of `models.likelihood`, and the parts [n, 1 + blocks] that they consist of."""
    z, logdets = model.patchify(images), [torch.full((len(images),), model.scale_logdet, device=images.device)]
    for block in model.blocks:
        z, logdet = block(z, y, noise=noise)
        logdets.append(logdet)
    bits = bits_from_density(log_density(model, z, sum(logdets[1:], logdets[0])), images[0].numel())
    shares = torch.stack([bits, *(-logdet / math.log(2) for logdet in logdets[1:])], dim=1).double().cpu().numpy()
    shares[:, 0] -= shares[:, 1:].sum(axis=1)  # the prior's is what the blocks leave
    return bits.double().cpu().numpy(), shares
