"""Images and labels that a program hands over, checked."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw import NO_LABEL
from tarflow.evaluation.samples.labels import label_number
from tarflow.models.noise import to_model_range

Labels = str | int | None | Sequence[str | int | None] | Tensor | NDArray[np.integer[Any]]
Images = Tensor | NDArray[Any]
GREY = 2.0  # the least that makes floats which are all positive grey levels


def checked_images(images: Images, shape: tuple[int, int, int]) -> Tensor:
    """Images [N, C, H, W], uint8 or floats.

    Raises EvaluationError where they do not have this (C, H, W), or another dtype, and for grey levels as floats.
    """
    tensor = torch.as_tensor(images)
    if tensor.ndim != 4 or tuple(tensor.shape[1:]) != shape:
        raise EvaluationError(f"images must have the shape [N, {', '.join(map(str, shape))}], not {list(tensor.shape)}")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise EvaluationError(f"images must be uint8 (0..255) or floats in [-1, 1], not {tensor.dtype}")
    # Noise and latents may lead far out of [-1, 1], but not to one side alone.
    if tensor.is_floating_point() and tensor.numel() and tensor.min() >= 0 and tensor.max() > GREY:
        raise EvaluationError(
            f"images as floats span [-1, 1], and these reach from {tensor.min():g} to {tensor.max():g}, as grey levels do: "
            "give these as uint8, or scale them (x / 127.5 - 1)"
        )
    return tensor


def images_in_model_range(images: Images, shape: tuple[int, int, int]) -> Tensor:
    """The same as float32, [-1, 1]."""
    tensor = checked_images(images, shape)
    return to_model_range(tensor) if tensor.dtype == torch.uint8 else tensor.float()


def label_numbers(labels: Labels, num_classes: int, classes: Sequence[str] | None) -> tuple[int, ...]:
    """Class numbers or names, one or many -> numbers, -1 for None. Raises EvaluationError for one that is not there."""
    if isinstance(labels, Tensor | np.ndarray):
        labels = labels.tolist()
    given: Sequence[str | int | None] = [labels] if labels is None or isinstance(labels, str | int) else labels
    if isinstance(given, Mapping):
        raise EvaluationError("labels must be class numbers or names in a list, not a mapping")
    # A number is a number, also where a class is named like another one's.
    words = (one if isinstance(one, str) else f"number:{NO_LABEL if one is None else one}" for one in given)
    return tuple(label_number(word, num_classes, classes, "labels") for word in words)


def labels_of(labels: Labels, num: int, num_classes: int, classes: Sequence[str] | None) -> Tensor | None:
    """Labels of `num` images, int64 [num], from one for all or one for each; None for a model without classes."""
    numbers = label_numbers(labels, num_classes, classes)
    if len(numbers) not in (1, num):
        raise EvaluationError(f"{len(numbers)} labels for {num} images: give one for all, or one for each")
    return torch.tensor(numbers, dtype=torch.int64).expand(num) if num_classes else None
