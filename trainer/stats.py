"""Metrics of a step, computed on the device."""

import torch
from torch import Tensor


@torch.no_grad()
def batch_stats(loss: Tensor, z: Tensor, logdet: Tensor, share: float) -> Tensor:
    """[loss, mean of z^2, log-determinant] of a micro-batch, float32 [3].

    `share`: of the rank's batch, by which the loss is weighted already and the other two are here.
    """
    return torch.stack([loss.detach(), z.square().mean() * share, logdet.mean() * share])
