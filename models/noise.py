"""Pixels to model space and back, and the noise that makes a density out of 8-bit data."""

import torch
from torch import Tensor


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 [..] -> float32 in [-1, 1]: 0 -> -1, 255 -> 1."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Model range -> uint8, rounded to the nearest grey level, as a PNG holds it (case S04).

    The images must be finite: what a non-finite value means is the caller's decision (case S03).
    """
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def dequantize(pixels: Tensor, uniform: Tensor) -> Tensor:
    """Uniform dequantisation: grey level k becomes a point of its interval, ((k + u) / 256) * 2 - 1, u in [0, 1)."""
    return (pixels.float() + uniform) / 256 * 2 - 1


def add_noise(pixels: Tensor, noise: Tensor, kind: str, noise_std: float) -> Tensor:
    """Pixels (uint8) with their training noise: kind "gaussian" (standard normal `noise`) or "uniform" ([0, 1))."""
    if kind == "uniform":
        return dequantize(pixels, noise)
    return to_model_range(pixels) + noise_std * noise
