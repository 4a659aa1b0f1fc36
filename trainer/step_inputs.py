"""From batches to the inputs of a step: images, noise, labels after dropout.

Noise, its level and label dropout are keyed by the position of a sample in the stream of samples, so they do not depend on
ranks, micro-batches or restarts. A thread draws them ahead of time, so that the loop does not wait for them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tarflow.data_pipeline.loading.prefetch import Prefetched
from tarflow.models.noise import add_noise, noise_levels
from tarflow.models.randomness import keyed_normal, keyed_uniform
from tarflow.trainer.config.schema import TrainConfig

if TYPE_CHECKING:
    from tarflow.data_pipeline.loading.batch import Batch


class MicroBatch(NamedTuple):
    """What one forward and backward pass takes, on the device."""

    images: Tensor  # float32 [n, C, H, W], with noise
    labels: Tensor  # int64 [n]
    share: float  # of the rank's batch
    levels: Tensor | None  # float32 [n], the noise level of each image, for a model that is told it


@dataclass
class StepInput:
    """A rank's share (b samples) of a global batch, on the CPU."""

    pixels: Tensor  # uint8 [b, C, H, W]
    noise: Tensor  # float32 [b, C, H, W], standard normal or uniform
    labels: Tensor  # int64 [b], -1 = no label
    images_seen: int  # before this step
    ids: Tensor  # int64 [b], sample ids in the data set
    slots: Tensor  # int64 [b], places in the global batch
    levels: Tensor | None = (
        None  # float32 [b], standard deviation of each image's noise; None: that of the configuration
    )

    def micro_batches(self, size: int, train: TrainConfig, device: torch.device) -> Iterator[MicroBatch]:
        """Yield micro-batches of `size` images, on the device."""
        total = len(self.pixels)
        for start in range(0, total, size):
            part = slice(start, start + size)
            pixels, noise, labels = (
                t[part].to(device, non_blocking=True) for t in (self.pixels, self.noise, self.labels)
            )
            levels = None if self.levels is None else self.levels[part].to(device, non_blocking=True)
            noisy = add_noise(pixels, noise, train.noise, train.noise_std if levels is None else levels)
            yield MicroBatch(noisy, labels, len(pixels) / total, levels)


def step_input(batch: "Batch", train: TrainConfig) -> StepInput:
    """Attach noise and label dropout to a batch."""
    positions = (batch.slots + batch.images_seen).tolist()
    draw = keyed_uniform if train.noise == "uniform" else keyed_normal
    noise = draw(train.seed, "noise", 0, positions, tuple(batch.images.shape[1:]))
    labels = batch.labels
    if train.label_dropout:
        dropped = keyed_uniform(train.seed, "label_dropout", 0, positions, ()) < train.label_dropout
        labels = torch.where(dropped, -1, labels)
    levels = None
    if train.noise_range is not None:
        drawn = keyed_uniform(train.seed, "noise_level", 0, positions, ())
        levels = noise_levels(drawn, train.noise_range, train.noise_distribution, train.noise_log_normal)
    return StepInput(batch.images, noise, labels, batch.images_seen, batch.ids, batch.slots, levels)


def prefetch_inputs(batches: "Iterable[Batch]", train: TrainConfig, pin: bool, ahead: int = 2) -> Prefetched[StepInput]:
    """Prepare inputs in a thread, up to `ahead` of the loop; errors are raised where the inputs are taken. `pin`: memory."""

    def produce() -> Iterator[StepInput]:
        for batch in batches:
            item = step_input(batch, train)
            if pin:
                item.pixels, item.noise, item.labels = (t.pin_memory() for t in (item.pixels, item.noise, item.labels))
                item.levels = None if item.levels is None else item.levels.pin_memory()
            yield item

    return Prefetched(produce(), ahead)
