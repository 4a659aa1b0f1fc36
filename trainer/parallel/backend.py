"""What the loop asks of a way to run a training step."""

from typing import Protocol

import torch
from torch import Tensor


class Backend(Protocol):
    """One training step, and the state behind it under engine-neutral names.

    Gradients are means over the global batch whatever the number of ranks and micro-batches; nothing here waits for
    the device.
    """

    rank: int
    world_size: int
    device: torch.device

    def forward_backward(self, images: Tensor, labels: Tensor | None, share: float) -> Tensor:
        """One micro-batch: noisy images [n, C, H, W], labels [n]; `share` = n / the rank's images in this step.

        Returns [loss, mse_z, logdet], means over the micro-batch times `share`, float32, on the device.
        """
        ...

    def optimizer_step(self, lr: float, grad_clip: float) -> Tensor:
        """Clip to the global norm (0 = off), update, clear the gradients. Returns the norm before clipping."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Float32 master weights by the model's parameter names."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Every tensor to save: "model/NAME", "optim/exp_avg/NAME", "optim/exp_avg_sq/NAME", "optim/step", "buffer/var".

        Loading fills them in place; `loaded` follows.
        """
        ...

    def loaded(self) -> None:
        """The tensors of `state` have new values: pass them on to whatever copies there are."""
        ...
