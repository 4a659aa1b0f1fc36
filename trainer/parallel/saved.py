"""Between the saved form of a tensor (whole, or sharded as a DTensor) and its whole value."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def place(saved: Tensor, value: Tensor) -> None:
    """Put a whole value into its saved form. Every rank calls it with the same value."""
    if isinstance(saved, DTensor):
        value = distribute_tensor(value.to(saved.device), saved.device_mesh, saved.placements)
    saved.copy_(value)


def whole(saved: Tensor) -> Tensor:
    """The whole value behind a saved form. Every rank calls it."""
    return saved.full_tensor() if isinstance(saved, DTensor) else saved
