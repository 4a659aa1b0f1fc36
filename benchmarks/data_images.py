"""The images of the data benchmarks: tiles of real photographs as JPEG, or made-up ones where those are missing.

The photographs are those of `tarflow data fetch photos` (wallpapers from Debian packages). The stand-in is noise with
the 1/f spectrum of natural images, which compresses to about the same size; every table says which was used.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.sample_reader import SampleReader
from tarflow.data_pipeline.loading.shape import ImageShape
from tarflow.data_pipeline.prepare.fetch import fetch
from tarflow.data_pipeline.prepare.sources import ImageSource
from tarflow.data_pipeline.prepare.write import Options, prepare
from tarflow.data_pipeline.storage.open_index import open_index

SIZE = 256
SHARD = 500


def write_images(folder: Path, most: int) -> tuple[Path, str]:
    """(data set of JPEGs of 256 px in shards of 500 with an index, what they show), below the new `folder`."""
    options = Options(size=SIZE, format="jpeg", quality=90, shard_size=SHARD)
    try:
        fetch("photos", folder, size=SIZE, options=options)
        return folder / "train", "photographs"
    except DataError:
        labels = np.zeros(most, dtype=np.int64)
        source = ImageSource(labels, None, lambda i: _natural(i), lambda i: f"image {i}")
        prepare(source, folder, options)
        return folder, "made-up images (the wallpaper packages are missing)"


def files_of(data: Path, most: int) -> list[bytes]:
    """The JPEG files of up to `most` samples, in index order."""
    index = open_index(data)
    reader = SampleReader(index, ImageShape(SIZE))
    files = []
    for sample in range(min(most, index.num_samples)):
        shard, row = index.locate(sample)
        rows = index.rows(shard)
        files.append(reader.files.read(shard, int(rows.offsets[row]), int(rows.sizes[row])))
    reader.close()
    return files


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="tarflow-bench-") as folder:
        yield Path(folder)


def _natural(number: int) -> NDArray[np.uint8]:
    """uint8 [256, 256, 3] with the power spectrum of photographs."""
    rng = np.random.default_rng(number)
    fy, fx = np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None]
    fall = 1 / np.maximum(np.hypot(fy, fx), 1 / SIZE) ** 1.2
    shape = (SIZE, SIZE // 2 + 1)
    grey, *tints = (
        np.fft.irfft2(fall * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)), (SIZE, SIZE))
        for _ in range(4)
    )
    image = np.stack([grey + 0.3 * tint for tint in tints], axis=2)
    return np.clip(128 + 45 * image / image.std(), 0, 255).astype(np.uint8)
