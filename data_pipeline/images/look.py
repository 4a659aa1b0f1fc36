"""A quick look at an image file: its size as shown, and whether it has colours."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.images.formats import FORMATS
from tarflow.data_pipeline.images.opening import png_without_metadata, webp_canvas

_GREY = ("1", "L", "LA", "La", "F")
_ORIENTATION = 0x0112
_SIDE = 64  # pixels to which an image is reduced before colours are looked for
_MAX_PIXELS = 1 << 23  # of a look at the pixels; beyond, the mode decides, to stay quick
_SPREAD = 12  # grey levels by which channels of a grey picture may differ: JPEG rounds each of them


@dataclass(frozen=True)
class Look:
    """What a quick look shows.

    `width`, `height`: pixels, with the EXIF orientation applied. `grey`: no colours, however many channels the file stores.
    """

    width: int
    height: int
    grey: bool


def look_at(data: bytes) -> Look | None:
    """The size and colours of an image file; None if it cannot be opened, for which decoding will give the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in (data, png_without_metadata(data)):
            try:
                if file is not None and not _too_large(webp_canvas(file)):
                    with Image.open(io.BytesIO(file), formats=FORMATS) as image:
                        return _look(image)
            except Exception:  # noqa: BLE001, S112 -- plug-ins raise anything for damaged files; the next try may open it
                continue
    return None


def look_at_pixels(pixels: NDArray[np.uint8]) -> Look:
    """The same of pixels that came without a file: uint8 [H, W, 3]."""
    return _look(Image.fromarray(pixels))


def _too_large(canvas: tuple[int, int] | None) -> bool:
    return canvas is not None and canvas[0] * canvas[1] > MAX_PIXELS


def _look(image: Image.Image) -> Look:
    width, height = image.size
    if image.getexif().get(_ORIENTATION, 1) >= 5:
        width, height = height, width
    return Look(width, height, _is_grey(image))


def _is_grey(image: Image.Image) -> bool:
    if image.mode in _GREY or image.mode.startswith("I"):
        return True
    image.draft("RGB", (_SIDE, _SIDE))  # a JPEG is decoded at a fraction of its size
    if image.width * image.height > _MAX_PIXELS:
        return False
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    pixels = np.asarray(small).astype(np.int16)
    return bool((pixels.max(axis=2) - pixels.min(axis=2)).max() <= _SPREAD)
