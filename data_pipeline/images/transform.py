"""From a decoded image to the square the model sees, and the keyed flip. One rule for training and evaluation.

The largest centred square of the image (side = shorter side; an odd remainder goes to the right and the bottom) is
resampled to `size` x `size` with Pillow's bicubic filter, which widens its support when shrinking (antialias). That is
"resize the shorter side, then crop the centre" in one step. A square of the right size already is only cut out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tarflow.data_pipeline import keyed


def fit(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """uint8 [H, W, C] -> uint8 [size, size, C], C = 1 or 3."""
    height, width, channels = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    if side == size:
        return image[top : top + size, left : left + size]
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    box = (left, top, left + side, top + side)
    resized = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return resized.reshape(size, size, channels)


def flips(seed: int, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether to mirror the sample at each stream position: bool of the same shape, a pure function of seed and position."""
    return (keyed.bits(keyed.key(seed, "flip"), np.asarray(positions)) >> np.uint64(63)).astype(bool)
