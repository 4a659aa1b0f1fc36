"""Score-based denoising after sampling (paper, section 3.4).

A flow trained on images with Gaussian noise of standard deviation sigma samples noisy images. Tweedie's formula takes
the noise out with the flow's own score: x + sigma^2 * grad_x log p(x).
"""

import torch
from torch import Tensor

from tarflow.models.flow import TarFlow
from tarflow.models.likelihood import log_likelihood


def denoise(model: TarFlow, images: Tensor, y: Tensor | None, noise_std: float, multiplier: float = 1.0) -> Tensor:
    """Images [N, C, H, W] -> x + m * sigma^2 * grad_x log p(x | y), float32, not clipped.

    `noise_std` is sigma of the training noise in model range; `multiplier` m is 1 in the paper (0 = no denoising).
    Each image is treated alone: the result does not depend on the batch it is in. Layers are computed twice instead of
    kept: a ninth of the memory, the same bits.
    """
    if multiplier == 0:
        return images
    with torch.enable_grad():
        x = images.detach().float().requires_grad_()
        (score,) = torch.autograd.grad(log_likelihood(model, x, y, recompute=True).sum(), x)
    return images + multiplier * noise_std**2 * score
