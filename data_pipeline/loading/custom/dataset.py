"""`data.dataset`: a data set that a user's function gives, with `__len__` and `__getitem__` -> (image, label).

The function is called with `data.train`, or `data.validation`; what it returns is read by number, in any order and in
several processes, each with a data set of its own. So it must be the same one every time: that is checked by a fingerprint of
its length and of some images, in every process.
"""

from __future__ import annotations

import hashlib
import operator
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.index.labels import MAX_CLASSES
from tarflow.data_pipeline.loading.custom.code import Function, Named, find_function
from tarflow.data_pipeline.loading.custom.pixels import kind, to_pixels

LOOKED_AT = 16  # images in the fingerprint, spread evenly
_MOST_SHARDS = 1 << 20
_MOST_IMAGES = 1 << 40


@dataclass
class CustomDataset:
    """An open data set of the user's. Names shared with `Index`: num_samples, classes, num_classes, fingerprint, shard_sizes.

    `classes`: its attribute of that name, if that is a list of texts, as torchvision's data sets have it.
    """

    function: Function
    place: str  # what the function was called with
    data: Any
    num_samples: int
    classes: list[str] | None
    _fingerprint: str = field(default="", init=False)

    @property
    def root(self) -> str:
        """What messages call the data set."""
        return f"{self.function.name}({self.place!r})"

    @property
    def num_classes(self) -> int | None:
        """Named classes; None where there are no names."""
        return None if self.classes is None else len(self.classes)

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Runs of images that are mixed as a whole: single ones up to a million, then longer, which keeps the order small."""
        run = -(-self.num_samples // _MOST_SHARDS)
        sizes = np.full(-(-self.num_samples // run), run, dtype=np.int64)
        sizes[-1] -= sizes.sum() - self.num_samples
        return sizes

    def where(self, sample: int) -> str:
        """What an error calls an image."""
        return f"{self.function}({self.place!r}), image {sample}"

    def read(self, sample: int, channels: int, max_pixels: int = MAX_PIXELS) -> tuple[NDArray[np.uint8], int | None]:
        """(uint8 [H, W, channels], label or None). Raises BadSampleError naming the function and the image's number."""
        with self.function.blamed(f"image {sample}"):
            item = self.data[sample]
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise BadSampleError("own_code", f"an item must be the pair (image, label), not {kind(item)}")
            return to_pixels(item[0], channels, max_pixels), _label(item[1])

    @property
    def fingerprint(self) -> str:
        """`custom-LENGTH-DIGEST`; the digest covers class names and some images with their labels. Raises DataError."""
        if not self._fingerprint:
            self._fingerprint = self._take_fingerprint()
        return self._fingerprint

    def _take_fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.classes).encode())
        for count, sample in enumerate(looked_at(self.num_samples)):
            one = self._digest(sample)
            if count < 2 and self._digest(sample) != one:
                raise DataError(
                    f"{self.function}: image {sample} is another one when it is read again, so no run could be resumed "
                    "exactly: give the same image for the same number, and put what is random into data.transform"
                )
            digest.update(one)
        return f"custom-{self.num_samples}-{digest.hexdigest()[:24]}"

    def _digest(self, sample: int) -> bytes:
        try:
            pixels, label = self.read(sample, 3)
        except BadSampleError as error:  # data.on_error decides about it when it is drawn
            return f"{sample}/{error.cause}".encode()
        return hashlib.sha256(f"{sample}/{label}/{pixels.shape}".encode() + pixels.tobytes()).digest()


def open_dataset(named: Named, place: str) -> CustomDataset:
    """Call the function with `place`. Raises DataError saying what is missing or went wrong."""
    function = find_function("data.dataset", named)
    with function.blamed(f"called with {place!r} (data.train or data.validation)"):
        data = function.call(place)
    missing = [method for method in ("__len__", "__getitem__") if not hasattr(data, method)]
    if missing:
        raise DataError(
            f"{function}: it must return something with __len__ and __getitem__; {kind(data)} has no {missing[0]}"
        )
    with function.blamed("its length"):
        length = operator.index(len(data))
    if not 1 <= length <= _MOST_IMAGES:
        raise DataError(f"{function}: the data set at {place!r} has {length} images")
    return CustomDataset(function, place, data, length, _classes(function, data))


def looked_at(num_samples: int, count: int = LOOKED_AT) -> list[int]:
    """Numbers of `count` images, spread evenly."""
    return sorted(set(np.linspace(0, num_samples - 1, count).astype(np.int64).tolist()))


def _classes(function: Function, data: Any) -> list[str] | None:
    found = getattr(data, "classes", None)
    if not isinstance(found, tuple | list) or not found or not all(isinstance(name, str) for name in found):
        return None
    different = len(set(found))
    if len(found) > MAX_CLASSES or different < len(found):
        raise DataError(f"{function}: its attribute classes has {len(found):,} names, {different:,} of them different")
    return list(found)


def _label(label: Any) -> int | None:
    """A label as a number; None and -1 are no label."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(label, torch.Tensor) and label.ndim == 0 and not label.is_floating_point():
        label = label.item()
    if isinstance(label, np.ndarray) and label.ndim == 0:
        label = label[()]
    if label is None:
        return None
    if isinstance(label, bool | np.bool_) or not isinstance(label, int | np.integer):
        raise BadSampleError("own_code", f"a label must be a whole number, or None for no label, not {kind(label)}")
    number = int(label)
    if not -1 <= number < MAX_CLASSES:
        raise BadSampleError(
            "label_out_of_range",
            f"the label is {number}; classes are numbered from 0 to at most {MAX_CLASSES - 1:,}, and -1 is no label",
        )
    return None if number == -1 else number
