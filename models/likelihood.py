"""Exact log-likelihood and bits per dimension (arXiv 2412.06329, section 2.1)."""

import math
from typing import TypeVar

import torch
from torch import Tensor

from tarflow.models.flow import TarFlow

# For 8-bit data in [-1, 1]: the Gaussian's normalization, and 7 bits for the width 2 / 256 = 2^-7 of a grey level.
BITS_CONSTANT = 0.5 * math.log2(2 * math.pi) + 7


NumberT = TypeVar("NumberT", float, Tensor)


def bits_from_nats(loss: NumberT) -> NumberT:
    """Bits per dimension from the loss in nats per dimension: loss / ln 2 + 8.32575."""
    return loss / math.log(2) + BITS_CONSTANT


def log_likelihood(
    model: TarFlow, images: Tensor, y: Tensor | None = None, recompute: bool = False, noise: Tensor | None = None
) -> Tensor:
    """Exact log p(x | y) of images [N, C, H, W] in [-1, 1], per image [N], in nats (a sum over all dimensions).

    By the change of variables, log p(x) = log p0(z) + log |det dz/dx|, with a Gaussian prior p0 of variance `model.var`
    (ones for the affine flow). `recompute`, `noise`: as in `TarFlow`; with noise levels [N], p is the density at those.
    """
    z, logdet = model(images, y, recompute=recompute, noise=noise)
    return log_density(model, z, logdet)


def log_density(model: TarFlow, z: Tensor, logdet: Tensor) -> Tensor:
    """Log p(x) per image [N], in nats, from latents z [N, T, D] and the log-determinant per dimension [N]."""
    var = model.var.float()
    energy = 0.5 * (z.square() / var + torch.log(2 * math.pi * var)).mean(dim=(1, 2))
    return (logdet - energy) * (z.shape[1] * z.shape[2])


def bits_per_dim(model: TarFlow, images: Tensor, y: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """Bits per dimension of 8-bit data, per image [N]: -log2 p(x) / dims + log2(128). `images` already contain their noise."""
    return bits_from_density(log_likelihood(model, images, y, noise=noise), images[0].numel())


def bits_from_density(log_p: Tensor, dims: int) -> Tensor:
    """Bits per dimension of 8-bit data from log p(x) in nats: -log2 p(x) / dims + log2(128)."""
    return -log_p / (dims * math.log(2)) + 7
