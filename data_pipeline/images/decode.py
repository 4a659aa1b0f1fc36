"""The one decoder: every image of every path (preparing, training, evaluation, contact sheets) goes through here.

Rules, the same for all formats:
- 16-bit grey is scaled to 8 bits with rounding (v * 255 / 65535), never clipped; wider or float images are refused.
- Transparency is composited on white.
- CMYK, palette, YCbCr, Lab and 1-bit images are converted to RGB. Embedded colour profiles are ignored.
- The EXIF orientation is applied. Of an animation, the first frame counts.
- One channel: luma of the RGB image (ITU-R 601). Three channels of a grey image: the grey three times.
- A file that is cut short or damaged raises `BadSampleError` and never gives a half grey picture. So does one of too many
  pixels; damaged or large metadata do not (`opening`).

JPEGs take a fast path through libjpeg-turbo with the same result as the general path. With `at_least`, a JPEG is
decoded at 1/2, 1/4 or 1/8 of its size if both sides stay at least that long; the caller resizes from there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS, check_scans, check_size
from tarflow.data_pipeline.images.opening import opened
from tarflow.image_size import Size, sides

WHITE = 255
_ORIENTATION = 0x0112
_EXIF = b"Exif\x00\x00"
_FACTORS = (8, 4, 2)
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)


def decode(data: bytes, channels: int, at_least: Size | None = None, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image file to uint8 [H, W, channels], channels 1 or 3.

    `at_least`: the size below which decoding must not reduce it (see `tarflow.image_size`). `max_pixels`: a bound on the pixels
    to decode; for a JPEG those of the reduced size count. Raises BadSampleError with the cause `undecodable` (damaged, cut
    short, no image), `unsupported` (float or 32-bit pixels) or `too_large`.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}, it must be 1 or 3")
    if data[:3] == b"\xff\xd8\xff":
        image = _decode_jpeg(data, channels, at_least, max_pixels)
        if image is not None:
            return image
    with opened(data, max_pixels) as found:
        return from_image(found, channels)


def decode_into(data: bytes, out: NDArray[np.uint8]) -> bool:
    """Decode a colour JPEG of exactly the shape of `out` (contiguous uint8 [H, W, 3]) straight into it.

    False where `decode` has to be used: another format or size, a grey image, an orientation, any error. `out` is then
    undefined. True: it holds the pixels that `decode` gives.
    """
    if data[:3] != b"\xff\xd8\xff" or out.shape[2] != 3:
        return False
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) != out.shape[:2] or colours not in ("YCbCr", "RGB") or _exif_at(data) >= 0:
            return False
        check_scans(data, height * width)
        simplejpeg.decode_jpeg(data, "RGB", buffer=out)
    except ValueError:
        return False
    return True


def from_pixels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Apply the rules to pixels that came without a file: uint8 [H, W, 1 | 3 | 4] -> uint8 [H, W, channels]."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    return from_image(image, channels)


def _decode_jpeg(data: bytes, channels: int, at_least: Size | None, max_pixels: int) -> NDArray[np.uint8] | None:
    """The fast path; None where the general path has to be used (CMYK, or any error of libjpeg-turbo)."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        check_scans(data, height * width)
        if colours not in ("YCbCr", "RGB", "Gray"):
            return None
        at = _exif_at(data)
        orientation = _exif_orientation(data[at:]) if at >= 0 else 1
        least_height = least_width = 0
        if at_least:
            tall, wide = sides(at_least) if orientation < 5 else sides(at_least)[::-1]  # of the stored picture
            for factor in _FACTORS:
                if height >= tall * factor and width >= wide * factor:
                    # Sides at 1/factor, rounded up as libjpeg does: asking for exactly these gives that factor.
                    least_height, least_width = -(-height // factor), -(-width // factor)
                    break
        if height * width > max_pixels:
            if least_height and not _is_progressive(data):  # a progressive one is held in memory at full size
                check_size(least_width, least_height, max_pixels)
            else:
                check_size(width, height, max_pixels)
        image = simplejpeg.decode_jpeg(
            data,
            "GRAY" if channels == 1 or colours == "Gray" else "RGB",
            min_height=least_height,
            min_width=least_width,
            min_factor=2,
        )
    except BadSampleError:
        raise
    except ValueError:
        return None
    if channels == 3 and image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    return _turn(np.asarray(image), orientation)


def _exif_at(jpeg: bytes) -> int:
    """The offset of the EXIF block of a JPEG, -1 without one."""
    return next((at + 10 for marker, at in _segments(jpeg) if marker == 0xE1 and jpeg[at + 4 : at + 10] == _EXIF), -1)


def _is_progressive(jpeg: bytes) -> bool:
    return any(marker in _PROGRESSIVE for marker, _ in _segments(jpeg))


def _segments(jpeg: bytes) -> Iterator[tuple[int, int]]:
    """(marker, offset) of a JPEG's segments up to the pixels."""
    at, end = 2, len(jpeg) - 10
    while at < end and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xDA:
            return
        if marker == 0xFF:  # a fill byte; any number may stand before a marker
            at += 1
            continue
        yield marker, at
        at += 2 + (jpeg[at + 2] << 8) + jpeg[at + 3]  # the length counts itself


def _exif_orientation(tiff: bytes) -> int:
    """The orientation (1..8) in the first directory of an EXIF block; 1 where it is absent or malformed."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 1
        (offset,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, offset)
        for i in range(entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, offset + 2 + 12 * i)
            if tag == _ORIENTATION and kind == 3:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _turn(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Apply an EXIF orientation to [H, W, C]."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 7, 6):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image if orientation == 1 else np.ascontiguousarray(image)


def from_image(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """Apply the rules to an image that is open already: uint8 [H, W, channels]. Raises BadSampleError (`unsupported`)."""
    orientation = _orientation(image)
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        array = _wide_to_grey(image)
        array = array if channels == 1 else np.repeat(array, 3, axis=2)
        return _turn(array, orientation)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        pixels = np.asarray(image.convert("RGBA")).astype(np.uint16)
        alpha = pixels[..., 3:]
        # Rounded division by 255; opaque pixels keep their value exactly.
        blended = (pixels[..., :3] * alpha + WHITE * (255 - alpha) + 127) // 255
        image = Image.fromarray(blended.astype(np.uint8), "RGB")
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return _turn(array.reshape(array.shape[0], array.shape[1], channels), orientation)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation (1..8); 1 where it is absent or malformed, as for JPEGs."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 -- Pillow's EXIF parser raises anything for a damaged block; the pixels are whole
        return 1
    return value if value in range(1, 9) else 1


def _wide_to_grey(image: Image.Image) -> NDArray[np.uint8]:
    """16-bit grey (modes I;16, I) to uint8 [H, W, 1]."""
    if image.mode == "F":
        raise BadSampleError("unsupported", "the pixels are floats; convert to 8 or 16 bits first")
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadSampleError(
            "unsupported", f"grey values run from {values.min()} to {values.max()}; at most 16 bits are supported"
        )
    grey = (values * 255 + 32767) // 65535
    see_through = image.info.get("transparency")
    if isinstance(see_through, int):
        grey[values == see_through] = WHITE
    return grey.astype(np.uint8)[..., None]
