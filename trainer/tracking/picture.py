"""Pictures as trackers show them."""

import struct
import zlib
from pathlib import Path

from PIL import Image

from tarflow.files import open_to_read

MAX_SIDE = 1024  # pixels of a picture's longer side; the original is with the result
NO_PICTURE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def opened(path: Path | str) -> Image.Image:
    """A PNG file, read, and made smaller than `MAX_SIDE`. Raises one of `NO_PICTURE` for anything else."""
    with open_to_read(path) as file, Image.open(file, formats=["PNG"]) as picture:
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
        picture.load()
        return picture.copy()
