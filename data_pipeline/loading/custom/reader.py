"""Reads samples of a user's own data set at the shape that the model takes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.images.crop import CENTRE, Crop
from tarflow.data_pipeline.loading.custom.dataset import CustomDataset
from tarflow.data_pipeline.loading.custom.transform import Transform
from tarflow.data_pipeline.loading.shape import ImageShape


class CustomReader:
    """See `sample_reader.Reader`.

    `max_pixels`: limit on an image. `transform`: applied to training images. `crop`: the rule by which they get the
    model's size.
    """

    def __init__(
        self, data: CustomDataset, shape: ImageShape, max_pixels: int = MAX_PIXELS, transform: Transform | None = None,
        crop: Crop = CENTRE,
    ) -> None:  # fmt: skip
        self.data, self.shape, self.max_pixels = data, shape, max_pixels
        self.transform, self.crop = transform, crop
        self.root, self.num_samples = data.root, data.num_samples

    def read(self, sample: int) -> tuple[NDArray[np.uint8], int]:
        """(uint8 [H, W, channels] of the model's size, label). Raises BadSampleError naming the image."""
        image = np.empty(self.shape.pixels, dtype=np.uint8)
        return image, self.read_into(sample, image)

    def read_into(self, sample: int, out: NDArray[np.uint8], epoch: int | None = None) -> int:
        """Write the image into `out`, uint8 [H, W, channels] of the model's size; returns the label.

        `epoch`: of a training image, to which the transform is applied. Raises BadSampleError naming the image.
        """
        image, label = self.data.read(sample, self.shape.channels, self.max_pixels)
        number = self._label(sample, label)
        if self.transform is not None and epoch is not None:
            image = self.transform(image, epoch, sample)
        out[...] = self.crop(image, self.shape.image_size, epoch, sample)
        return number

    def read_full(self, sample: int) -> tuple[NDArray[np.uint8], int]:
        """(uint8 [H, W, channels] as the data set gives it, label). Raises BadSampleError naming the image."""
        image, label = self.data.read(sample, self.shape.channels, self.max_pixels)
        return image, self._label(sample, label)

    def close(self) -> None:
        """Nothing: the data set is the user's."""

    def _label(self, sample: int, label: int | None) -> int:
        try:
            return self.shape.label(label)
        except BadSampleError as error:
            raise BadSampleError(error.cause, f"{self.data.where(sample)}: {error}") from None

    def others(self, sample: int) -> Iterator[int]:
        """The following ones, and after the last the first."""
        for step in range(1, self.num_samples):
            yield (sample + step) % self.num_samples
