"""Files opened by Pillow, within bounds: what formats, how many pixels, and metadata that cannot cost the image.

The bound on pixels holds before any is decoded. Text and colour profiles of a PNG that Pillow refuses (it unpacks no more
than 1 MiB of each) are passed over unread, whatever their size; pixels do not depend on them.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS, check_size
from tarflow.data_pipeline.images.formats import FORMATS

_PNG = b"\x89PNG\r\n\x1a\n"
# What pixels, transparency and orientation are made of; an animation's other frames are not wanted.
_PNG_NEEDED = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"sBIT"))


@contextmanager
def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image in `data`, with its pixels loaded. Raises BadSampleError: `too_large`, `undecodable`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large or oddly tagged images warn on every read
        try:
            image = _load(data, max_pixels)
        except (BadSampleError, MemoryError):
            raise
        except (
            Exception
        ) as err:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error, IndexError ...
            bare = png_without_metadata(data)
            if bare is None:
                raise _undecodable(data, err) from None
            try:
                image = _load(bare, max_pixels)
            except (BadSampleError, MemoryError):
                raise
            except Exception as again:
                raise _undecodable(data, again) from None
        with image:
            try:
                yield image
            except (BadSampleError, MemoryError):
                raise
            except Exception as err:  # conversions raise as plug-ins do
                raise _undecodable(data, err) from None


def size_of(data: bytes) -> tuple[int, int] | None:
    """(width, height) of the image whose file begins with `data`; None where that does not tell."""
    for head in (data, png_without_metadata(data)):
        try:
            if head is not None:
                if canvas := webp_canvas(head):
                    return canvas
                with Image.open(io.BytesIO(head), formats=FORMATS) as image:
                    return image.size
        except Exception:  # noqa: S112 -- what a plug-in raises for a cut head; decoding will say what is wrong
            continue
    return None


def _load(data: bytes, max_pixels: int) -> Image.Image:
    # Pillow's own bound (twice this) holds for the whole process and for what lies inside an icon: it is raised, never lowered.
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
    check_size(*image.size, max_pixels)  # an icon has told only now
    return image


def _undecodable(data: bytes, err: Exception) -> BadSampleError:
    if isinstance(err, UnidentifiedImageError):
        return BadSampleError("undecodable", f"not an image: {data[:12]!r}... ({len(data)} bytes)")
    return BadSampleError("undecodable", f"cannot decode: {err} ({len(data)} bytes)")


def webp_canvas(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP; None for anything else. Its reader takes memory for all of it as soon as it is opened."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    return None  # of the others, a side has 14 bits


def png_without_metadata(data: bytes) -> bytes | None:
    """A PNG without the chunks that its pixels do not need; None where `data` is none, or has no others."""
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
