"""Small data sets for the tests: shards written by plain webdataset, the id of a sample readable from its pixels."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tarflow.data_pipeline.index.build import build_index


def image_bytes(number: int, size: int = 8, format: str = "PNG") -> bytes:
    """A flat image whose colour tells `number` (0 .. 65535) without loss in PNG."""
    pixels = np.empty((size, size, 3), dtype=np.uint8)
    pixels[...] = (number & 255, number >> 8, 77)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def number_of(image: object) -> int:
    """The number in an image [3, H, W] written by `image_bytes`."""
    pixels = np.asarray(image)
    return int(pixels[0, 0, 0]) + 256 * int(pixels[1, 0, 0])


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], **options: Any) -> None:
    """A tar with exactly these members."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shards(root: Path, sizes: Sequence[int], *, classes: int = 3, image_size: int = 8) -> list[Path]:
    """Shards with these sample counts; sample n shows n, has key n and label n % classes."""
    root.mkdir(parents=True, exist_ok=True)
    paths = []
    number = 0
    for shard, size in enumerate(sizes):
        members: list[tuple[str, bytes]] = []
        for _ in range(size):
            members.append((f"{number:05d}.png", image_bytes(number, image_size)))
            if classes:
                members.append((f"{number:05d}.cls", str(number % classes).encode()))
            number += 1
        paths.append(root / f"shard-{shard:04d}.tar")
        write_tar(paths[-1], members)
    return paths


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """`make_set([10, 7, 1])` writes and indexes a data set and returns its folder."""

    def make(sizes: Sequence[int], name: str = "set", **options: int) -> Path:
        root = tmp_path / name
        shards = write_shards(root, sizes, **options)
        build_index(root, shards)
        return root

    return make


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The helpers of this file, for tests that build shards of their own."""
    return SimpleNamespace(image_bytes=image_bytes, number_of=number_of, write_tar=write_tar, write_shards=write_shards)
