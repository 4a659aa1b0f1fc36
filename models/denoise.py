"""Score-based denoising after sampling, in one step or in many.

In one step (arXiv 2412.06329, section 2.5): a flow trained on images with Gaussian noise of standard deviation sigma samples
noisy images. Tweedie's formula gives the expected clean image from the flow's own score: E[clean | x] = x + sigma^2 *
grad_x log p(x).

In many steps (arXiv 2604.20041): a flow that is told the noise level knows the score at every level, so that the noise can be
taken out a little at a time. With x0 the expected clean image at level t, and s the next level below,

    v = (x - x0) / t                                                          the noise in x, in units of its level
    ODE          x <- x - (t - s) v
    stochastic   x <- x0 + s (sqrt(r) v + sqrt(1 - r) e),   r = (s / t)^2,    e standard normal

and where s = 0, x <- x0.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tarflow.models.flow import TarFlow
from tarflow.models.likelihood import log_likelihood

Score = Callable[[Tensor, float], Tensor]  # (x, noise level t) -> grad_x log p_t(x), of the shape of x
Fresh = Callable[[int], Tensor]  # number of a step, from 0 -> its standard normal numbers, of the shape of x


def denoise(model: TarFlow, images: Tensor, y: Tensor | None, noise_std: float, multiplier: float = 1.0) -> Tensor:
    """Images [N, C, H, W] -> x + m * sigma^2 * grad_x log p(x | y), float32, not clipped.

    `noise_std` is sigma of the training noise in model range; `multiplier` m is 1 in the paper (0 = no denoising).
    Each image's result is independent of its batch. Activation checkpointing takes a ninth of the memory at the same bits.
    """
    if multiplier == 0:
        return images
    return images + multiplier * noise_std**2 * _score(model, images, y, None)


def flow_score(model: TarFlow, y: Tensor | None) -> Score:
    """The score of a flow that is told the noise level, for labels [N]; memory as in `denoise`."""
    return lambda x, level: _score(model, x, y, torch.full((len(x),), level, device=x.device))


def _score(model: TarFlow, images: Tensor, y: Tensor | None, noise: Tensor | None) -> Tensor:
    with torch.enable_grad():
        x = images.detach().float().requires_grad_()
        # The sum has per-image gradients: no image's likelihood depends on another image.
        total = log_likelihood(model, x, y, recompute=True, noise=noise).sum()
        return torch.autograd.grad(total, x)[0]


def schedule(high: float, low: float, steps: int, kind: str = "linear") -> list[float]:
    """The noise levels of so many steps: from `high` to `low`, at equal distances or in equal ratios ("geometric"), then 0."""
    if kind == "geometric":
        return [high * (low / high) ** (k / max(steps - 1, 1)) for k in range(steps)] + [0.0]
    return [high + (low - high) * k / max(steps - 1, 1) for k in range(steps)] + [0.0]


def step(x: Tensor, clean: Tensor, level: float, lower: float, fresh: Tensor | None = None) -> Tensor:
    """From one noise level to a lower one, given the expected clean image; see the head of this file.

    `fresh`: standard normal numbers of the stochastic form; None follows the ODE.
    """
    if lower == 0:
        return clean
    direction = (x - clean) / level
    if fresh is None:
        return x - (level - lower) * direction
    ratio = (lower / level) ** 2
    return clean + lower * (ratio**0.5 * direction + (1 - ratio) ** 0.5 * fresh)


def denoise_in_steps(
    images: Tensor,
    levels: Sequence[float],
    score: Score,
    fresh: Fresh | None = None,
    states: list[Tensor] | None = None,
) -> Tensor:
    """Images [N, C, H, W] with noise of level levels[0] -> clean ones, not clipped, down `levels`, the last of which is 0.

    `fresh`: the numbers of the stochastic form. A list given as `states` receives the images before the first step and after
    each one.
    """
    x = images
    for number, (level, lower) in enumerate(pairwise(levels)):
        if states is not None:
            states.append(x)
        clean = x + level**2 * score(x, level)
        x = step(x, clean, level, lower, fresh(number) if fresh is not None and lower > 0 else None)
    if states is not None:
        states.append(x)
    return x
