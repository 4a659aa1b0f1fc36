"""Crops by rule: how an image of any shape becomes one of the model's size. For squares a rule is as its source has it.

- `centre`: the largest centred box of the model's shape, bicubic, in one step (`transform.fit`).
- `adm`: halved by a box filter while both sides stay at least twice the model's, then bicubic until one side fits, then the
  centre. Source: ADM, openai/guided-diffusion, image_datasets.py, `center_crop_arr` (EDM2 calls it center-crop-dhariwal).
- `edm`: the largest centred box in whole pixels, cut out, then Lanczos. Source: EDM, NVlabs/edm, dataset_tool.py,
  `--transform=center-crop`.
- `random`: a box of 8% to 100% of the area, of 3/4 to 4/3 times the model's shape, anywhere; cut out, then bicubic. Source:
  torchvision, RandomResizedCrop with its default ranges.

The first three depend on the image alone. `random` is for training images and keyed by (seed, epoch, image): the same crop for
any number of ranks and workers, and after any resume. Held-out images and reference statistics are never cropped at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tarflow.data_pipeline import keyed
from tarflow.data_pipeline.images.transform import fit, picture_of, pixels_of
from tarflow.image_size import Size, sides

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, left, height, width

FIXED = ("centre", "adm", "edm")
"""The rules that depend on the image alone: what a set can be prepared with."""
RULES = (*FIXED, "random")
LEAST_AREA = 0.08
SHAPES = (3 / 4, 4 / 3)
_TRIES = 10


@dataclass(frozen=True)
class Crop:
    """A rule, and the seed of its random numbers."""

    rule: str = "centre"
    seed: int = 0

    @property
    def is_random(self) -> bool:
        """Whether training images are cut differently in each epoch."""
        return self.rule == "random"

    @property
    def reduced_ok(self) -> bool:
        """Whether a large JPEG may be decoded at a fraction of its size first: only our own rule allows for it."""
        return self.rule == "centre"

    def __call__(self, image: Pixels, size: Size, epoch: int | None = None, sample: int = 0) -> Pixels:
        """uint8 [H, W, C] -> uint8 of `size`, C = 1 or 3. `epoch`, `sample`: of a training image."""
        if self.is_random and epoch is not None:
            return resized(image, random_box(image, size, keyed.key(self.seed, "crop", epoch, sample)), size)
        return {"adm": adm, "edm": edm}.get(self.rule, fit)(image, size)


CENTRE = Crop()


def adm(image: Pixels, size: Size) -> Pixels:
    """ADM's centre crop: uint8 [H, W, C] -> uint8 of `size`."""
    height, width = sides(size)
    picture = picture_of(image)
    while picture.height >= 2 * height and picture.width >= 2 * width:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(height / picture.height, width / picture.width)
    whole = (round(picture.width * scale), round(picture.height * scale))
    pixels = pixels_of(picture.resize(whole, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def edm(image: Pixels, size: Size) -> Pixels:
    """EDM's centre crop: uint8 [H, W, C] -> uint8 of `size`."""
    return resized(image, centred(image, size), size, Image.Resampling.LANCZOS)


def centred(image: Pixels, size: Size) -> Box:
    """The largest centred box of the shape of `size`, in whole pixels."""
    height, width = sides(size)
    scale = min(image.shape[0] / height, image.shape[1] / width)
    return _central(image, round(height * scale), round(width * scale))


def random_box(image: Pixels, size: Size, key: int) -> Box:
    """The box of a random resized crop, by the random numbers of `key`; a centred one where ten tries do not fit."""
    (height, width), wanted = image.shape[:2], sides(size)[1] / sides(size)[0]
    low, high = (shape * wanted for shape in SHAPES)
    draws = _uniform(key)
    for _ in range(_TRIES):
        area = height * width * (LEAST_AREA + (1 - LEAST_AREA) * next(draws))
        shape = math.exp(math.log(low) + (math.log(high) - math.log(low)) * next(draws))  # width over height
        rows, columns = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        down, right = next(draws), next(draws)
        if 0 < rows <= height and 0 < columns <= width:
            return int(down * (height - rows + 1)), int(right * (width - columns + 1)), rows, columns
    if width / height < low:
        return _central(image, max(1, round(width / low)), width)
    if width / height > high:
        return _central(image, height, max(1, round(height * high)))
    return 0, 0, height, width


def resized(image: Pixels, box: Box, size: Size, how: Image.Resampling = Image.Resampling.BICUBIC) -> Pixels:
    """A box of an image, cut out and then resized: no pixel outside of it counts."""
    (top, left, rows, columns), (height, width) = box, sides(size)
    return pixels_of(picture_of(image[top : top + rows, left : left + columns]).resize((width, height), how))


def _central(image: Pixels, rows: int, columns: int) -> Box:
    rows, columns = max(1, rows), max(1, columns)
    return (image.shape[0] - rows) // 2, (image.shape[1] - columns) // 2, rows, columns


def _uniform(key: int) -> Iterator[float]:
    """Numbers in [0, 1), a function of `key`."""
    yield from ((keyed.bits(key, np.arange(4 * _TRIES)) >> np.uint64(11)) * 2.0**-53).tolist()
