"""What a loader delivers, and which part of the stream: plain values, which a worker process reads without pydantic."""

from __future__ import annotations

from dataclasses import dataclass

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.order import check_world


def _check(name: str, value: object, right: bool) -> None:
    """Raise DataError, naming the value, unless it is right."""
    if not right:
        raise DataError(f"data.{name} cannot be {value!r}")


@dataclass(frozen=True)
class ImageShape:
    """What the model wants of a sample: a square of `image_size` pixels with `channels` channels (1 or 3), and a label.

    `num_classes`: 0 = unconditional, labels come as -1; otherwise labels outside 0 .. num_classes-1 are refused.
    Raises DataError.
    """

    image_size: int
    channels: int = 3
    num_classes: int = 0

    def __post_init__(self) -> None:
        _check("image_size", self.image_size, self.image_size >= 1)
        _check("channels", self.channels, self.channels in (1, 3))

    @property
    def pixels(self) -> tuple[int, int, int]:
        """(H, W, C) of a decoded image."""
        return (self.image_size, self.image_size, self.channels)


@dataclass(frozen=True)
class BatchShard:
    """Which samples are this rank's: an equal share of each global batch, from position `images_seen` of the stream on.

    `seed` chooses the stream. `images_seen`: images that all ranks together have seen before (any number >= 0).
    Raises DataError, also where the global batch does not divide among the ranks.
    """

    global_batch_size: int
    images_seen: int = 0
    rank: int = 0
    world_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_world(self.global_batch_size, self.rank, self.world_size)
        _check("images_seen", self.images_seen, self.images_seen >= 0)

    @property
    def share(self) -> int:
        """Samples of a global batch that are this rank's."""
        return self.global_batch_size // self.world_size
