"""The bound on the pixels of an image, checked before any of them is decoded, whatever the format."""

from __future__ import annotations

from tarflow.data_pipeline.errors import BadSampleError

MAX_SIDE = 16_384  # pixels of the side of a square that images are brought to, as of a model's images
MAX_PIXELS = 180_000_000  # 13,400 x 13,400: half a gigabyte in colour


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise BadSampleError (`too_large`) for an image of more pixels than are decoded."""
    if width * height > max_pixels:
        raise BadSampleError(
            "too_large",
            f"the image is {width} x {height}, {width * height:,} pixels, and at most {max_pixels:,} are decoded "
            "(data.max_image_pixels, --max-pixels)",
        )
