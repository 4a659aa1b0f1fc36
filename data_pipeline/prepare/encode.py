"""Pixels as the bytes of an image file."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

QUALITY = 95  # of JPEGs


def encode(pixels: np.ndarray, format: str, quality: int = QUALITY) -> bytes:
    """uint8 [H, W, 1 | 3] as the bytes of a file. PNG and WebP are lossless; JPEG keeps full colour resolution."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    if format == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    elif format == "webp":
        image.save(buffer, "WEBP", lossless=True)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()
