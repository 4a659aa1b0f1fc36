"""An image as a user's function gives it -> uint8 pixels, by the rules of the one decoder (`images.decode`).

| what comes | how it is read |
|---|---|
| a PIL image of any mode | as a file that holds it: transparency on white, 16-bit grey scaled, EXIF orientation applied |
| a uint8 array, [H, W], [H, W, C] or [C, H, W] | C is the axis of 1, 3 or 4 values |
| a uint8 tensor of torch, on any device | as an array |

Where the first and the last axis both could be the channels, an array is [H, W, C] and a tensor [C, H, W] (torchvision's way).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.images.bounds import check_size
from tarflow.data_pipeline.images.decode import from_image, from_pixels

_CHANNELS = (1, 3, 4)


def to_pixels(image: Any, channels: int, max_pixels: int) -> NDArray[np.uint8]:
    """uint8 [H, W, channels], contiguous. Raises BadSampleError (`unsupported`, `too_large`) saying what came instead."""
    if isinstance(image, Image.Image):
        check_size(*image.size, max_pixels)
        return from_image(image, channels)
    torch = sys.modules.get("torch")  # a tensor can only come from where torch is loaded already
    is_tensor = torch is not None and isinstance(image, torch.Tensor)
    array = image.detach().cpu().numpy() if is_tensor else image
    if not isinstance(array, np.ndarray):
        raise BadSampleError(
            "unsupported", f"an image must be a PIL image, or an array or tensor of uint8, not {kind(image)}"
        )
    if array.dtype != np.uint8:
        raise BadSampleError("unsupported", f"the image is of {array.dtype}; it must be uint8, 0 to 255")
    array = _channels_last(array, is_tensor)
    check_size(array.shape[1], array.shape[0], max_pixels)
    return np.ascontiguousarray(from_pixels(array, channels))


def _channels_last(array: NDArray[np.uint8], is_tensor: bool) -> NDArray[np.uint8]:
    if array.ndim == 2 and array.size:
        return array[..., None]
    first, last = (array.ndim == 3 and array.shape[axis] in _CHANNELS for axis in (0, -1))
    if not array.size or not (first or last):
        raise BadSampleError(
            "unsupported",
            f"the image has the shape {list(array.shape)}; it must be [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels",
        )
    return array.transpose(1, 2, 0) if first and (is_tensor or not last) else array


def kind(value: object) -> str:
    """What a value is, for an error: its type, and the keys of a dictionary."""
    if isinstance(value, dict):
        return f"a dictionary with {', '.join(map(repr, list(value)[:8])) or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
