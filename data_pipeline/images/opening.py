"""Read image files, and open them with Pillow, within bounds on formats and pixels, and whatever their metadata.

The bound on pixels is checked before any is decoded. Text and colour profiles of a PNG that Pillow refuses (it unpacks at
most 1 MiB of each) are skipped unread; pixels do not depend on them.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS, check_bytes, check_size
from tarflow.data_pipeline.images.formats import FORMATS
from tarflow.files import read_bytes

_PNG = b"\x89PNG\r\n\x1a\n"
# The chunks with pixels, transparency and orientation; an animation's other frames are not needed.
_PNG_NEEDED = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"sBIT"))


def read_image(file: Path) -> bytes:
    """The bytes of an image file. Raises BadSampleError for one that is too large, OSError."""
    check_bytes(file.stat().st_size)
    return read_bytes(file)


@contextmanager
def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image in `data`, with its pixels loaded. Raises BadSampleError: `too_large`, `undecodable`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large or oddly tagged images warn on every read
        try:
            image = _load(data, max_pixels)
        except (BadSampleError, MemoryError):
            raise
        except Exception as err:  # noqa: BLE001 -- plug-ins raise OSError, SyntaxError, ValueError, struct.error, IndexError ...
            bare = png_without_metadata(data)
            if bare is None:
                raise _undecodable(data, err) from None
            try:
                image = _load(bare, max_pixels)
            except (BadSampleError, MemoryError):
                raise
            except Exception as again:  # noqa: BLE001 -- as above
                raise _undecodable(data, again) from None
        with image:
            try:
                yield image
            except (BadSampleError, MemoryError):
                raise
            except Exception as err:  # noqa: BLE001 -- conversions raise as plug-ins do
                raise _undecodable(data, err) from None


def size_of(data: bytes) -> tuple[int, int] | None:
    """(width, height) of the image whose file begins with `data`; None if that is not enough to know."""
    for head in (data, png_without_metadata(data)):
        try:
            if head is not None:
                if canvas := webp_canvas(head):
                    return canvas
                with Image.open(io.BytesIO(head), formats=FORMATS) as image:
                    return image.size
        except Exception:  # noqa: BLE001, S112 -- what plug-ins raise for the beginning of a file
            continue
    return None


def _load(data: bytes, max_pixels: int) -> Image.Image:
    # Pillow's own bound (twice this) is global, and also applies to images inside an icon: only ever raise it.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    if canvas := webp_canvas(data):
        check_size(*canvas, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadSampleError(
            "too_large",
            f"the image has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, and at most {max_pixels:,} are decoded "
            "(data.max_image_pixels, --max-pixels)",
        ) from None
    check_size(*image.size, max_pixels)
    image.load()
    check_size(*image.size, max_pixels)  # the size of an icon is only known now
    return image


def _undecodable(data: bytes, err: Exception) -> BadSampleError:
    if isinstance(err, UnidentifiedImageError):
        return BadSampleError("undecodable", f"not an image: {data[:12]!r}... ({len(data)} bytes)")
    return BadSampleError("undecodable", f"cannot decode: {err} ({len(data)} bytes)")


def webp_canvas(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP; None for anything else. Opening one allocates all of its pixels, so ask first."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    return None  # sides of the other kinds have 14 bits, which bounds the memory


def png_without_metadata(data: bytes) -> bytes | None:
    """A PNG without the chunks that its pixels do not need; None if `data` is not a PNG, or has no such chunks."""
    if not data.startswith(_PNG):
        return None
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunk = data[at : at + 12 + length]
        if chunk[4:8] in _PNG_NEEDED or not chunk[4] & 32:  # a capital letter: a critical chunk
            kept.append(chunk)
        at += 12 + length
    if at < len(data):
        kept.append(data[at:])
    bare = b"".join(kept)
    return bare if len(bare) < len(data) else None
