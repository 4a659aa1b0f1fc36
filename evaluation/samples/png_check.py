"""Checks that a stored PNG is complete: a crash or a full disk may leave less than was written."""

import io
import struct
import zlib
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from tarflow.evaluation.errors import EvaluationError
from tarflow.files import read_up_to

_FAULTS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
LARGEST = 64 << 20  # bytes
_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG, with its checksum


def flaw_of_file(path: Path, shape: tuple[int, int, int] | None) -> str | None:
    """What is wrong with a PNG file, or None. Raises EvaluationError if it cannot be read at all."""
    try:
        if not path.is_file():
            raise EvaluationError(f"{path} cannot be read: it is not a regular file")
        content = read_up_to(path, LARGEST)
        return flaw(content, shape) if len(content) <= LARGEST else f"larger than {LARGEST} bytes"
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}") from None


def flaw(data: bytes, shape: tuple[int, int, int] | None) -> str | None:
    """What is wrong with the bytes of a PNG of `shape` (channels, height, width; None = any), or None."""
    if not data:
        return "empty"
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            channels, height, width = len(picture.getbands()), picture.height, picture.width
            if shape is not None and (channels, height, width) != shape:
                return f"{width} x {height} pixels, {channels} channels, instead of {shape[2]} x {shape[1]}, {shape[0]}"
            picture.verify()  # checks the CRC of every chunk
    except UnidentifiedImageError:
        return "not a PNG"
    except _FAULTS as error:
        return f"damaged ({error})"
    return None if data.endswith(_END) else "cut off"
