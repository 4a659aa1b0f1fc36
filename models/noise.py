"""Pixels to model range and back, and the noise that turns 8-bit data into a density (arXiv 2412.06329, section 2.4)."""

import torch
from torch import Tensor


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


def add_noise(pixels: Tensor, noise: Tensor, kind: str, noise_std: float) -> Tensor:
    """Pixels (uint8) with training noise of a kind: "gaussian" (`noise` is standard normal) or "uniform" (in [0, 1))."""
    if kind == "uniform":
        return dequantize(pixels, noise)
    return to_model_range(pixels) + noise_std * noise
