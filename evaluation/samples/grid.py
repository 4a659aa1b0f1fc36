"""Grids of images with plain margins. Small images are enlarged by integer factors, so that pixels stay sharp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError

MARGIN = 2  # pixels between images, before enlarging
BACKGROUND = 255
_VISIBLE = 56  # images smaller than this are enlarged


def grid_indices(rows: int, columns: int, num_classes: int) -> list[int]:
    """Samples of a grid, row by row, such that a row holds one class if sample i has label i % num_classes.

    Without classes the grid holds samples 0, 1, 2, ... With fewer classes than rows the classes repeat; with more, the first
    ones are shown.
    """
    if num_classes == 0:
        return list(range(rows * columns))
    return [
        ((row // num_classes) * columns + column) * num_classes + row % num_classes
        for row in range(rows)
        for column in range(columns)
    ]


def make_grid(images: Sequence[Tensor | None], columns: int) -> Tensor:
    """Images, uint8 [C, H, W] of one size or None for an empty cell -> one picture uint8 [C, H', W'].

    Every image has a white margin of 2 pixels, enlarged with the image.
    """
    present = [image for image in images if image is not None]
    if not present:
        raise EvaluationError("there are no images for a grid: no sample is finite")
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
