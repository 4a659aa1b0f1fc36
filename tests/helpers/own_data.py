"""Data sets and transforms as a user writes them, sound and broken, for `data.dataset` and `data.transform`."""

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.helpers.data import spots

Pixels = NDArray[np.uint8]


class Spots:
    """`spots` as a data set: 96 images of 8 px, or as many as the place says (`train-40`)."""

    classes = ("left", "middle", "right")

    def __init__(self, place: str) -> None:
        name, _, count = place.partition("-")
        self.images, self.labels = spots(int(count or 96))
        if name == "held":
            self.images = np.uint8(255) - self.images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


class Items:
    """A list of items with whatever is in it."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        return item() if callable(item) else item


def forms(place: str) -> Items:
    """One picture of 5 x 6 px, in the forms that an image may have."""
    pixels = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)
    return Items([(form(pixels), number) for number, form in enumerate(FORMS)])


def tensor(array: Pixels) -> Any:
    import torch  # which data workers do not need otherwise

    return torch.from_numpy(array.copy())


FORMS: list[Callable[[Pixels], Any]] = [
    lambda pixels: Image.fromarray(pixels),
    lambda pixels: pixels,
    lambda pixels: pixels.transpose(2, 0, 1),
    lambda pixels: tensor(pixels.transpose(2, 0, 1)),
    lambda pixels: tensor(pixels),
    lambda pixels: Image.fromarray(pixels).convert("RGBA"),
]


class Broken(Spots):
    """Spots with an image, number 5, that is never read."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if index == 5:
            raise KeyError("no such picture")
        return super().__getitem__(index)


class Restless(Spots):
    """Other pixels at each reading."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return np.random.default_rng().integers(0, 255, (8, 8), dtype=np.uint8), 0


class OfProcess(Spots):
    """Other images in each process, as a list from an unordered folder may be."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.images = np.roll(self.images, os.getpid() % 90 + 1, axis=0)


def numbers(place: str) -> Items:
    """Spots without names of classes."""
    images, labels = spots(int(place))
    return Items(list(zip(images, labels)))


def no_argument() -> Spots:
    return Spots("train")


def not_a_set(place: str) -> int:
    return len(place)


def empty(place: str) -> list[Any]:
    return []


def shift(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Roll by a random number of pixels, with some noise."""
    noise = rng.integers(0, 8, image.shape, dtype=np.uint8)
    return np.roll(image // 2, int(rng.integers(8)), axis=1) + noise


def crop(image: Pixels, rng: np.random.Generator) -> Image.Image:
    """A random crop, as a PIL image of another size."""
    left = int(rng.integers(0, 3))
    return Image.fromarray(np.squeeze(image)).crop((left, 0, left + 5, 5))


def careless(image: Pixels, rng: np.random.Generator) -> Pixels:
    return np.roll(image, random.randrange(1, 1 << 30), axis=1) + np.uint8(random.randrange(255))


def failing(image: Pixels, rng: np.random.Generator) -> Pixels:
    return image.reshape(-1, 7, 9)
