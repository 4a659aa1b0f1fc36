"""The images whose likelihoods are taken: of a data set, or of a folder."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.images.look import Look, look_at
from tarflow.data_pipeline.images.opening import read_image
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.survey import LOOKED_AT, survey
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.data_set import ImageSet, crop_text
from tarflow.evaluation.images.folder import ImageFolder
from tarflow.evaluation.log import Log
from tarflow.evaluation.samples.draw import NO_LABEL
from tarflow.evaluation.samples.labels import label_number
from tarflow.evaluation.samples.weights_source import WeightsSource
from tarflow.image_size import plain, shown, sides
from tarflow.models.config import TarFlowConfig
from tarflow.trainer.config.class_names import difference


class Images(Protocol):
    """Images at the model's size, by number."""

    @property
    def num_images(self) -> int:
        """How many."""

    def provenance(self) -> dict[str, Any]:
        """What their likelihoods depend on."""

    def batches(self, batch_size: int, part: int, parts: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(pixels uint8 [n, C, H, W], labels int64 [n], numbers int64 [n]) of one of several parts."""

    def name(self, number: int) -> str:
        """What an image is called; empty where it has only its number."""


class OfSet:
    """Images of a data set, numbered as in its index; `limit` of them, spread evenly (0 = all)."""

    def __init__(self, data: str, model: TarFlowConfig, limit: int, classes: tuple[str, ...] | None, label: int | None):
        self.set, self.label = ImageSet(DataSettings.of(data), model, limit), label
        index = self.set.index
        names = index.classes
        if label is not None or not model.num_classes:
            return
        if isinstance(index, Index) and index.unlabelled == index.num_samples:
            raise EvaluationError(
                f"{data} has no labels, and the weights {model.num_classes} classes: give --labels NAME or none"
            )
        if classes is None or names is None:
            return
        if problem := difference(("the weights", classes), (data, names)):
            raise EvaluationError(f"{problem}: give --labels NAME or none, or prepare the images with --classes FILE")

    @property
    def num_images(self) -> int:
        """How many."""
        return self.set.num_images

    def provenance(self) -> dict[str, Any]:
        """What their likelihoods depend on."""
        return {**self.set.provenance(), "labels": "of the data set" if self.label is None else self.label}

    def batches(self, batch_size: int, part: int, parts: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, labels and numbers of one of several parts."""
        for pixels, labels, ids in self.set.batches(self.label is None, batch_size, part, parts):
            yield pixels, labels if self.label is None else torch.full_like(labels, self.label), ids

    def name(self, number: int) -> str:  # noqa: ARG002 -- a set's images have numbers alone
        """None."""
        return ""


class OfFolder:
    """Images of a folder, numbered in the order of their names; without labels, or all with one.

    `limit` of them, spread evenly (0 = all).
    """

    def __init__(self, folder: Path, model: TarFlowConfig, limit: int, label: int | None):
        self.model_size = model.image_size
        self.images = ImageFolder(folder, model.in_channels, model.image_size)
        total = len(self.images.files)
        count = min(limit, total) if limit else total
        self.files = [self.images.files[number * total // count] for number in range(count)]
        self.label = NO_LABEL if label is None else label

    @property
    def num_images(self) -> int:
        """How many."""
        return len(self.files)

    def provenance(self) -> dict[str, Any]:
        """What their likelihoods depend on."""
        size = self.model_size
        return {
            "data": str(self.images.root.resolve()), "files": self._fingerprint(),
            "images": self.num_images, "image_size": plain(size),
            "channels": self.images.channels, "crop": crop_text(size), "labels": self.label,
        }  # fmt: skip

    def batches(self, batch_size: int, part: int, parts: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, labels and numbers of one of several parts."""
        first, last = (len(self.files) * k // parts for k in (part, part + 1))
        mine = copy.copy(self.images)
        mine.files = self.files[first:last]
        for pixels in mine.batches(batch_size) if mine.files else ():
            numbers = torch.arange(first, first + len(pixels))
            yield pixels, torch.full_like(numbers, self.label), numbers
            first += len(pixels)

    def _fingerprint(self) -> str:
        """Changes when a picture is added, removed, renamed or written again."""
        digest = hashlib.sha256()
        for number, file in enumerate(self.files):
            status = file.stat()
            digest.update(repr((self.name(number), status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()

    def name(self, number: int) -> str:
        """The file, below the folder."""
        return self.files[number].relative_to(self.images.root).as_posix()


def is_data_set(data: Path) -> bool:
    """Whether DATA has an index (or is an address), rather than being a folder of images."""
    return "://" in str(data) or ":/" in str(data) or (data / "index").is_dir() or (data / "index.json").is_file()


def open_images(data: Path, source: WeightsSource, num: int, label: str | None, log: Log) -> Images:
    """The images of DATA for the model of `source`: `num` of them, spread evenly (0 = all).

    `label`: "data" or None for those of the data set, or one for all images, as typed. Raises EvaluationError where there is
    neither a data set nor a folder, and for a label that the model does not have.
    """
    model, classes = source.model.config, source.provenance.classes
    one = None if label in (None, "data") else label_number(label, model.num_classes, classes, "--labels")
    if is_data_set(data):
        images: Images = OfSet(str(data), model, num, classes, one)
        looks = survey(DataSettings.of(str(data))).looks
    elif not data.is_dir():
        raise EvaluationError(f"DATA {data}: there is no such data set or folder of images")
    else:
        images = folder = OfFolder(data, model, num, one)
        if model.num_classes and label is None:
            log(f"{data} is a folder of images: they are taken without a label (--labels NAME gives one)")
        looks = _looks(folder.files)
    for note in _conversions(looks, model):
        log(f"note: {data}: {note}")
    return images


def _looks(files: Sequence[Path]) -> tuple[Look, ...]:
    """At a few of the files, spread evenly; those that cannot be read are errors later, when their turn comes."""
    found = []
    for place in sorted({number * len(files) // LOOKED_AT for number in range(LOOKED_AT)}):
        with suppress(BadSampleError, OSError):
            found.append(look_at(read_image(files[place])))
    return tuple(look for look in found if look)


def _conversions(looks: Sequence[Look], model: TarFlowConfig) -> Iterator[str]:
    """What is done to images that are not as the model takes them: the figures are of what comes out."""
    size = model.image_size
    if others := sum((look.height, look.width) != sides(size) for look in looks):
        shape = "square" if isinstance(size, int) else "rectangle of this shape"
        yield (
            f"{others} of {len(looks)} images looked at are not {shown(size)} pixels: such images are cropped to their "
            f"largest centred {shape} and resized to {plain(size)}"
        )
    if model.in_channels == 1 and (coloured := sum(not look.grey for look in looks)):
        yield f"{coloured} of {len(looks)} images looked at have colours, and the model has none: they become grey"
