"""Grids of images with plain margins; small images are enlarged by whole factors so that pixels stay pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError

MARGIN = 2  # pixels between images, before enlarging
BACKGROUND = 255
_VISIBLE = 56  # images smaller than this are enlarged


def grid_indices(rows: int, columns: int, num_classes: int) -> list[int]:
    """Which samples stand in a grid, row by row, when sample i has label i % num_classes: a row holds one class.

    Without classes the grid holds samples 0, 1, 2, ... With fewer classes than rows the classes come round again, with
    more the first ones are shown.
    """
    if num_classes == 0:
        return list(range(rows * columns))
    return [
        ((row // num_classes) * columns + column) * num_classes + row % num_classes
        for row in range(rows)
        for column in range(columns)
    ]


def make_grid(images: Sequence[Tensor | None], columns: int) -> Tensor:
    """Images, each uint8 [C, H, W] of one size, or None for an empty place -> one picture uint8 [C, H', W'].

    Margins of 2 pixels (enlarged with the images) in white surround every image.
    """
    present = [image for image in images if image is not None]
    if not present:
        raise EvaluationError("there is no image to put into a grid: every sample was left out as not finite")
    channels, height, width = present[0].shape
    rows = -(-len(images) // columns)
    cell_h, cell_w = height + MARGIN, width + MARGIN
    canvas = torch.full((channels, rows * cell_h + MARGIN, columns * cell_w + MARGIN), BACKGROUND, dtype=torch.uint8)
    for place, image in enumerate(images):
        if image is not None:
            row, column = divmod(place, columns)
            top, left = row * cell_h + MARGIN, column * cell_w + MARGIN
            canvas[:, top : top + height, left : left + width] = image
    factor = -(-_VISIBLE // max(height, width))
    return canvas.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
