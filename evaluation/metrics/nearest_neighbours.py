"""Nearest training images of samples, and whether they have the label that the sample was drawn with.

Distances are between 8-bit pixels; images above 64 pixels are first averaged down to 64 at most. Sums of whole numbers
in float64 are exact, so the neighbours do not depend on batches or machines. Training images are streamed: memory holds
the samples and their neighbours only.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError

NEIGHBOURS = 5
LARGEST = 64


@dataclass
class Neighbours:
    """The nearest training images of n samples, nearest first; ties go to the image that comes first."""

    labels: Tensor  # [n, k] int64 labels of the neighbours, -1 = none
    ids: Tensor  # [n, k] int64 sample ids
    distances: Tensor  # [n, k] root mean square difference, in grey levels
    nearest: Tensor  # [n, C, H, W] uint8: the nearest one itself
    searched: int  # training images compared


def nearest_neighbours(
    samples: Tensor, training: Iterable[tuple[Tensor, Tensor, Tensor]], k: int = NEIGHBOURS
) -> Neighbours:
    """The k nearest training images of samples uint8 [n, C, H, W]; `training` yields (pixels, labels, ids) batches."""
    ours = _comparable(samples)
    n = len(samples)
    squares = torch.empty(n, 0, dtype=torch.float64)
    labels, ids = torch.empty(n, 0, dtype=torch.int64), torch.empty(n, 0, dtype=torch.int64)
    nearest = torch.zeros_like(samples)
    searched = 0
    for pixels, batch_labels, batch_ids in training:
        if pixels.shape[1:] != samples.shape[1:]:
            raise EvaluationError(
                f"training images have shape {list(pixels.shape[1:])}, samples {list(samples.shape[1:])}"
            )
        theirs = _comparable(pixels)
        new = ours.square().sum(1, keepdim=True) + theirs.square().sum(1) - 2 * ours @ theirs.T
        # The nearest image itself is kept on the way: the training images are read only once.
        closer = new.min(dim=1)
        better = closer.values < squares[:, 0] if squares.shape[1] else torch.ones(n, dtype=torch.bool)
        nearest[better] = pixels[closer.indices[better]]
        squares = torch.cat([squares, new], dim=1)
        labels = torch.cat([labels, batch_labels.expand(n, -1)], dim=1)
        ids = torch.cat([ids, batch_ids.expand(n, -1)], dim=1)
        order = squares.sort(dim=1, stable=True).indices[:, :k]
        squares, labels, ids = (t.gather(1, order) for t in (squares, labels, ids))
        searched += len(pixels)
    if not searched:
        raise EvaluationError("there are no training images to search for neighbours: data.train is empty")
    return Neighbours(labels, ids, (squares / ours.shape[1]).sqrt(), nearest, searched)


def _comparable(pixels: Tensor) -> Tensor:
    """uint8 [n, C, H, W] -> float64 [n, d] of whole grey levels, at most 64 x 64 pixels."""
    height, width = pixels.shape[2:]
    longer = max(height, width)
    if longer > LARGEST:
        smaller = (max(1, height * LARGEST // longer), max(1, width * LARGEST // longer))
        pixels = F.adaptive_avg_pool2d(pixels.float(), smaller).round()
    return pixels.flatten(1).double()


def vote(neighbour_labels: Tensor) -> Tensor:
    """[n, k] labels, nearest first -> the most frequent one [n]; ties go to the label of the nearest."""
    same = neighbour_labels.unsqueeze(2) == neighbour_labels.unsqueeze(1)
    votes = same.sum(dim=2).masked_fill(neighbour_labels < 0, 0)
    return neighbour_labels.gather(1, _first_max(votes).unsqueeze(1)).squeeze(1)


def _first_max(values: Tensor) -> Tensor:
    """Index of the first largest entry of each row (torch's argmax does not guarantee the first)."""
    largest = values == values.max(dim=1, keepdim=True).values
    return (largest & (largest.cumsum(dim=1) == 1)).int().argmax(dim=1)


def label_agreement(sample_labels: Tensor, neighbours: Neighbours) -> float | None:
    """Share of labelled samples whose neighbours vote for the label they were drawn with; None without any label."""
    asked = sample_labels >= 0
    if not asked.any():
        return None
    return float((vote(neighbours.labels)[asked] == sample_labels[asked]).double().mean())
