"""From a decoded image to what the model sees, and the keyed flip. One rule for training and evaluation unless `crop` is set.

The largest centred box of the model's shape (a square has the image's shorter side; an odd remainder goes to the right and
the bottom) is resampled to the model's size with Pillow's bicubic filter, which widens its support when shrinking
(antialias). That is "resize until one side fits, then crop the centre" in one step. A box of the right size is only cut out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tarflow.data_pipeline import keyed
from tarflow.image_size import Size, sides


def fit(image: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """uint8 [H, W, C] -> uint8 [height, width, C] of `size`, C = 1 or 3."""
    (rows, columns), (height, width) = image.shape[:2], sides(size)
    # Of a rectangle one side may end within a pixel; of a square both are whole.
    if rows * width <= columns * height:
        tall, wide = float(rows), rows * width / height
    else:
        tall, wide = columns * height / width, float(columns)
    top, left = int((rows - tall) // 2), int((columns - wide) // 2)
    if (tall, wide) == (height, width):
        return image[top : top + height, left : left + width]
    box = (left, top, left + wide, top + tall)
    return pixels_of(picture_of(image).resize((width, height), Image.Resampling.BICUBIC, box=box))


def picture_of(image: NDArray[np.uint8]) -> Image.Image:
    """uint8 [H, W, 1 or 3] for Pillow."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else np.ascontiguousarray(image))


def pixels_of(picture: Image.Image) -> NDArray[np.uint8]:
    """A grey or an RGB picture as uint8 [H, W, 1 or 3]."""
    pixels = np.asarray(picture)
    return pixels.reshape(picture.height, picture.width, -1)


def flips(seed: int, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether to mirror the sample at each stream position: bool of the same shape, a pure function of seed and position."""
    return (keyed.bits(keyed.key(seed, "flip"), np.asarray(positions)) >> np.uint64(63)).astype(bool)
