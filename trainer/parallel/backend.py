"""The protocol between the training loop and an engine that runs its steps.

State has two forms. *Local*: plain float32 tensors of this rank, which live as long as the run; optimizer and averages
work on them. *Saved*: what a checkpoint holds, whole tensors or sharded ones (DTensor), under names that belong to no
engine; so any backend reads what any other wrote, at any world size.
"""

from typing import Protocol

import torch
from torch import Tensor

from tarflow.models.flow import TarFlow


class Backend(Protocol):
    """One training step, and the state behind it.

    Gradients are means over the global batch whatever the number of ranks and micro-batches; nothing here waits
    for the device.
    """

    device: torch.device
    model: TarFlow  # what computes

    def forward_backward(
        self, images: Tensor, labels: Tensor | None, share: float, last: bool, noise: Tensor | None = None
    ) -> Tensor:
        """One micro-batch: noisy images [n, C, H, W], labels [n]; `share` = n / the rank's images in this step.

        `noise` [n]: the noise level of each image, for a model that is told it. `last`: the step's last micro-batch, after
        which gradients are summed over ranks. Returns [loss, mse_z, logdet],
        this rank's means over the micro-batch times `share`, float32, on the device.
        """
        ...

    def optimizer_step(self, lr: float) -> Tensor:
        """Clip, update (or skip a bad step), clear the gradients. Returns the global norm before clipping."""
        ...

    def skipped(self) -> Tensor:
        """[steps skipped in all, in a row until now], on the device."""
        ...

    def locals(self) -> dict[str, Tensor]:
        """Each float32 master weight by the model's parameter names: the part that this rank holds."""
        ...

    def to_saved(self, name: str, local: Tensor) -> Tensor:
        """A local tensor that is laid out as the weight `name`, in the form a checkpoint holds. Every rank calls it."""
        ...

    def from_saved(self, name: str, saved: Tensor, local: Tensor) -> None:
        """Put a saved tensor's values into a local one (nothing to do where they share memory). Every rank calls it."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Saved form of everything but averages. Fill these tensors and pass them to `load` to restore.

        Names: "model/NAME", "optim/exp_avg/NAME", "optim/exp_avg_sq/NAME", "optim/step", "buffer/var", "guard/...".
        """
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over the values of tensors that `state` gave and a checkpoint filled."""
        ...
