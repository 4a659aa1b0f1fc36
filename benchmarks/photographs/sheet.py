"""One small picture of the samples of several runs, for a page: their grids under each other, in few colours."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

MOST_BYTES = 200_000
_COLOURS = (256, 128, 64, 32, 16, 8)
_GAP = 8  # white rows between two grids


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """The images under each other, on white."""
    height = sum(image.height for image in images) + _GAP * (len(images) - 1)
    page = Image.new("RGB", (max(image.width for image in images), height), "white")
    top = 0
    for image in images:
        page.paste(image.convert("RGB"), (0, top))
        top += image.height + _GAP
    return page


def sheet(grids: Sequence[Path], out: Path) -> Path | None:
    """Write the grids into one PNG file of at most MOST_BYTES, with as many colours as that allows; nothing without a grid."""
    if not grids:
        return None
    page = stacked([Image.open(grid) for grid in grids])
    while True:
        for colours in _COLOURS:
            buffer = io.BytesIO()
            page.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
                buffer, "png", optimize=True
            )
            if buffer.tell() <= MOST_BYTES:
                out.write_bytes(buffer.getvalue())
                return out
        page = page.reduce(2)
