"""Metrics of a step, computed on the device."""

import torch
from torch import Tensor

from tarflow.models.flow import flow_loss
from tarflow.models.noise import loss_weight
from tarflow.models.provenance import Weighting


def training_loss(z: Tensor, logdet: Tensor, noise: Tensor | None, weighting: Weighting) -> Tensor:
    """The mean over images of the loss in nats per dimension, each by w(t) of its noise level where there are levels [N]."""
    each = flow_loss(z, logdet)
    return (each if noise is None else loss_weight(noise, weighting) * each).mean()


@torch.no_grad()
def batch_stats(loss: Tensor, z: Tensor, logdet: Tensor, share: float) -> Tensor:
    """[loss, mean of z^2, log-determinant] of a micro-batch, float32 [3].

    `share`: of the rank's batch, by which the loss is weighted already and the other two are here.
    """
    return torch.stack([loss.detach(), z.square().mean() * share, logdet.mean() * share])
