"""Images of any source as the files that go into shards: decoded once, cropped, encoded, in threads."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.images.crop import Crop
from tarflow.data_pipeline.images.decode import decode, from_pixels
from tarflow.data_pipeline.prepare.source import ImageSource
from tarflow.image_size import Size, sides

QUALITY = 95  # of JPEGs
_CHUNK = 256  # images in flight between the threads and the writer
_MAX_THREADS = 16


@dataclass(frozen=True)
class Encoding:
    """What images become: of `size` pixels with 1 or 3 channels (0: as many as the source has), by `crop`, in a file format."""

    size: Size
    format: str = "png"
    quality: int = QUALITY
    channels: int = 0
    max_pixels: int = MAX_PIXELS
    crop: str = "centre"

    def convert(self, data: bytes | NDArray[np.uint8]) -> tuple[bytes, bool]:
        """(a file's bytes or pixels as the bytes of a file, whether it was enlarged). Raises BadSampleError."""
        if isinstance(data, bytes):
            pixels = decode(data, self.channels or 3, None, self.max_pixels)
        else:
            pixels = from_pixels(data, self.channels or (1 if data.shape[2] == 1 else 3))
        height, width = sides(self.size)
        small = pixels.shape[0] < height or pixels.shape[1] < width
        return encode(Crop(self.crop)(pixels, self.size), self.format, self.quality), small


def encode(pixels: NDArray[np.uint8], format: str, quality: int = QUALITY) -> bytes:
    """uint8 [H, W, 1 | 3] as the bytes of a file. PNG and WebP are lossless; JPEG keeps full colour resolution."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    if format == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    elif format == "webp":
        image.save(buffer, "WEBP", lossless=True)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def encoded_images(
    source: ImageSource, numbers: NDArray[np.int64], encoding: Encoding
) -> Iterator[tuple[int, tuple[bytes, bool] | BadSampleError]]:
    """(number, what `Encoding.convert` gives or why there is nothing) for each of `numbers`, in order."""

    def work(number: int) -> tuple[bytes, bool] | BadSampleError:
        try:
            return encoding.convert(_read(source, number))
        except BadSampleError as err:
            return err

    # Threads are enough: Pillow releases the interpreter lock. Chunks bound what waits for the writer.
    with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for start in range(0, len(numbers), _CHUNK):
            chunk = numbers[start : start + _CHUNK].tolist()
            yield from zip(chunk, pool.map(work, chunk))


def _read(source: ImageSource, number: int) -> bytes | NDArray[np.uint8]:
    try:
        return source.read(number)
    except OSError as err:
        raise BadSampleError("unreadable", f"cannot read: {err.strerror}") from None
