"""Pixels to model range and back, and the noise that turns 8-bit data into a density (arXiv 2412.06329, section 2.4).

Also noise of many levels, one drawn per image, and what tells a flow the level t of its images (arXiv 2604.20041).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflow.models.provenance import NoiseDistribution, Weighting

SLOWEST = 10_000.0  # ratio of the highest to the lowest frequency of the embedding, as published


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 [..] -> float32 in [-1, 1]: 0 -> -1, 255 -> 1."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Model range -> uint8, rounded to the nearest grey level and clamped, as a PNG stores it.

    Truncation would darken every image by half a grey level, which moves an FID. The images must be finite: a cast turns
    NaN into an arbitrary grey level, so the caller handles it first.
    """
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def dequantize(pixels: Tensor, uniform: Tensor) -> Tensor:
    """Uniform dequantization: grey level k becomes a point of its bin, ((k + u) / 256) * 2 - 1, u in [0, 1)."""
    return (pixels.float() + uniform) / 256 * 2 - 1


def add_noise(pixels: Tensor, noise: Tensor, kind: str, noise_std: float | Tensor) -> Tensor:
    """Pixels (uint8) with training noise of a kind: "gaussian" (`noise` is standard normal) or "uniform" (in [0, 1)).

    `noise_std`: of all images, or [N] of each.
    """
    if kind == "uniform":
        return dequantize(pixels, noise)
    if isinstance(noise_std, Tensor):
        noise_std = noise_std.view(-1, *[1] * (noise.ndim - 1))
    return to_model_range(pixels) + noise_std * noise


def noise_levels(
    uniform: Tensor, bounds: tuple[float, float], distribution: NoiseDistribution, log_normal: tuple[float, float]
) -> Tensor:
    """Noise levels t [N] in [t0, t1] = `bounds`, from numbers [N] in [0, 1) by the inverse of t's distribution function.

    uniform: t; squared_uniform: t^2 uniform, so that high levels are more frequent; log_normal: log t normal of the mean and
    standard deviation `log_normal`, cut off at t0 and t1. Computed in float64, returned in float32.
    """
    u, (low, high) = uniform.double(), bounds
    if distribution == "uniform":
        t = low + u * (high - low)
    elif distribution == "squared_uniform":
        t = (low**2 + u * (high**2 - low**2)).sqrt()
    else:
        mean, std = log_normal
        first, last = ((math.log(t) - mean) / std for t in bounds)
        # Both ends above the mean: of their mirror images, since 1 - (a small number) has no digits of it.
        side = -1.0 if first > 0 else 1.0
        below, above = (0.5 * math.erfc(-side * end / math.sqrt(2)) for end in (first, last))
        t = torch.exp(mean + std * side * torch.special.ndtri(below + u * (above - below)))
    return t.clamp(low, high).float()  # rounding may step over an end


def loss_weight(levels: Tensor, weighting: Weighting) -> Tensor:
    """w(t) [N] of each image's loss: 1, t or t^2."""
    return levels ** {"none": 0, "level": 1, "level_squared": 2}[weighting]


def sinusoids(levels: Tensor, channels: int) -> Tensor:
    """Noise levels t [N] -> [N, C]: sines, then cosines, of log t at the frequencies 10000^(-k / (C/2)), k = 0 .. C/2 - 1."""
    k = torch.arange(channels // 2, dtype=levels.dtype, device=levels.device)
    angles = torch.log(levels)[:, None] * torch.exp(k * (-math.log(SLOWEST) / (channels // 2)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class WideLinear(nn.Linear):
    """A linear layer that multiplies at least in float32, whatever the dtype of its weights and under any autocast.

    In bfloat16, neighbouring noise levels would have the same embedding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out], in the dtype of x."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class NoiseEmbedding(nn.Module):
    """What a block is told of the noise in its images: sinusoids of log t, then a two-layer perceptron."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.main = nn.Sequential(WideLinear(channels, 4 * channels), nn.GELU(), WideLinear(4 * channels, channels))

    def forward(self, levels: Tensor) -> Tensor:
        """Noise levels t [N] > 0, standard deviations in model range -> [N, 1, C] in float32 (float64 for float64)."""
        levels = levels if levels.dtype == torch.float64 else levels.float()
        return self.main(sinusoids(levels, self.channels))[:, None]
