"""Sampling: each block inverted with a key-value cache (arXiv 2412.06329, sections 2.2 and 2.6), by default token by token.

Guidance runs the conditional and the unconditional half as one batch of 2N rows.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from tarflow.models.flow import FlowBlock, TarFlow
from tarflow.models.sampling.engine import EagerBlock
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.inverse import invert
from tarflow.models.sampling.measure import measure_plan
from tarflow.models.sampling.plan import plan_without_measuring
from tarflow.models.sampling.settings import SamplingSettings

UNGUIDED = SamplingSettings(guidance=0.0)


@overload
def sample(
    model: TarFlow,
    noise: Tensor,
    labels: Tensor | None = None,
    settings: SamplingSettings = UNGUIDED,
    return_trajectory: Literal[False] = False,
) -> Tensor: ...


@overload
def sample(
    model: TarFlow,
    noise: Tensor,
    labels: Tensor | None = None,
    settings: SamplingSettings = UNGUIDED,
    *,
    return_trajectory: Literal[True],
) -> tuple[Tensor, list[Tensor]]: ...


@torch.inference_mode()
def sample(
    model: TarFlow,
    noise: Tensor,
    labels: Tensor | None = None,
    settings: SamplingSettings = UNGUIDED,
    return_trajectory: bool = False,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Standard normal noise [N, T, D] and labels [N] (-1 = no label) -> images [N, C, H, W], float32, not clipped.

    Of the settings guidance, method and tolerance act here: seed, dtype and denoising are the caller's
    (`evaluation.samples.draw`), and certificates come from `inverse.invert`.
    Row i of the result depends on row i of the noise and of the labels alone. With `return_trajectory` also the images
    after 0, 1, ... blocks, from the noise to the result.
    """
    if settings.method == "auto":
        plan = measure_plan(model, noise, labels, settings)
    else:
        plan = plan_without_measuring(model.config, settings)
    done = invert(model, noise, labels, settings, plan, with_trajectory=return_trajectory)
    return (done.images, done.trajectory) if return_trajectory else done.images


def invert_block(block: FlowBlock, z: Tensor, labels: Tensor | None, guidance: Guidance) -> Tensor:
    """Invert one block: z [N, T, D] -> x [N, T, D], by x_i = z_i * exp(a_i) + b_i for i = 0, 1, ... in turn."""
    x = block.order(z).clone()
    EagerBlock(block, labels, z.shape[0], guidance).invert(x)
    return block.order(x)
