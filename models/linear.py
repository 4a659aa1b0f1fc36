"""The linear layer of the transformer: torch's own, or for many rows on the CPU the same product as a 1 x 1 convolution.

torch hands float32 products on the CPU to MKL and convolutions to oneDNN, which may be the faster of the two and adds the
bias on the way (`benchmarks/linear.py`; `benchmarks/train_step.py` for the whole step). Rows become the pixels of one
image with its channels last, so nothing is copied but the weights' gradient, and autograd does the rest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY_ROWS = 2048  # below, setting up a convolution costs more than it brings


class Linear(nn.Linear):
    """y = x W^T + b over the last dimension of x [..., in_features]."""

    def forward(self, x: Tensor) -> Tensor:
        if _by_convolution(x):
            return linear_by_convolution(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def _by_convolution(x: Tensor) -> bool:
    """Compiled code is left to the compiler; on one thread, and for other types, torch does not call oneDNN.

    Whether gradients are wanted plays no part: a layer computed again in the backward pass must go the same way.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and x.numel() >= MANY_ROWS * x.shape[-1]
        and torch.get_num_threads() > 1
    )


def linear_by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same as `F.linear`, as a convolution of one image of 1 x rows pixels."""
    n, k = weight.shape
    image = x.reshape(1, 1, -1, k).permute(0, 3, 1, 2)
    return F.conv2d(image, weight.view(n, k, 1, 1), bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], n)
