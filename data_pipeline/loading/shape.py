"""What a loader delivers, and to which rank: plain values, which a worker process reads without pydantic."""

from __future__ import annotations

from dataclasses import dataclass

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.loading.order import check_world
from tarflow.image_size import Size, is_size, sides


def _check(name: str, value: object, valid: bool) -> None:
    """Raise DataError, naming the value, unless it is valid."""
    if not valid:
        raise DataError(f"data.{name} cannot be {value!r}")


@dataclass(frozen=True)
class ImageShape:
    """What the model takes: images of `image_size` pixels (see `tarflow.image_size`) with 1 or 3 `channels`, and a label.

    `num_classes`: 0 = unconditional, labels come as -1; otherwise labels outside 0 .. num_classes-1 are refused.
    Raises DataError.
    """

    image_size: Size
    channels: int = 3
    num_classes: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.image_size, list):  # from JSON
            object.__setattr__(self, "image_size", tuple(self.image_size))
        _check("image_size", self.image_size, is_size(self.image_size))
        _check("channels", self.channels, self.channels in (1, 3))

    @property
    def pixels(self) -> tuple[int, int, int]:
        """(H, W, C) of a decoded image."""
        return (*sides(self.image_size), self.channels)

    def label(self, label: int | None) -> int:
        """A sample's label as batches hold it: -1 for a model without classes. Raises BadSampleError where it does not fit."""
        if not self.num_classes:
            return -1
        if label is None:
            raise BadSampleError("missing_label", f"has no label, the model has {self.num_classes} classes")
        if not 0 <= label < self.num_classes:
            raise BadSampleError("label_out_of_range", f"label {label} is outside 0..{self.num_classes - 1}")
        return label


@dataclass(frozen=True)
class BatchShard:
    """One rank's share of each global batch, in the stream of samples that `seed` selects.

    Raises DataError where the rank does not exist or the global batch does not divide among the ranks.
    """

    global_batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_world(self.global_batch_size, self.rank, self.world_size)

    @property
    def size(self) -> int:
        """Samples per global batch for this rank."""
        return self.global_batch_size // self.world_size
