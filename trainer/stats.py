"""The figures that a step leaves on the device."""

import torch
from torch import Tensor


@torch.no_grad()
def batch_stats(loss: Tensor, z: Tensor, logdet: Tensor, share: float) -> Tensor:
    """[loss, mean of z^2, log-determinant] of a micro-batch; the last two times `share`, as the loss already is."""
    return torch.stack([loss.detach(), z.square().mean() * share, logdet.mean() * share])
