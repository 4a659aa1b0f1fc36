"""Sampling: each block inverted token by token with a key-value cache (arXiv 2412.06329, sections 2.2 and 2.6).

Guidance runs the conditional and the unconditional half as one batch of 2N rows.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from tarflow.models.errors import ModelError
from tarflow.models.flow import FlowBlock, TarFlow
from tarflow.models.sampling.engine import EagerBlock
from tarflow.models.sampling.guidance import Guidance
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

    Of the settings only guidance acts here: seed, dtype and denoising are the caller's (`evaluation.samples.draw`).
    Row i of the result depends on row i of the noise and of the labels alone. With `return_trajectory` also the images
    after 0, 1, ... blocks, from the noise to the result.
    """
    check_labels(model, labels, noise.shape[0])
    x = noise.float() * model.var.float().sqrt()  # the prior's scale per token and dimension; 1 where nvp
    trajectory = [model.unpatchify(x)]
    blocks, tokens = model.config.num_blocks, model.config.num_tokens
    for number in reversed(range(blocks)):
        guidance = Guidance.of_block(settings, number, blocks, tokens)
        x = invert_block(model.blocks[number], x, labels, guidance)  # type: ignore[arg-type]
        if return_trajectory:
            trajectory.append(model.unpatchify(x))
    images = model.unpatchify(x)
    return (images, trajectory) if return_trajectory else images


def check_labels(model: TarFlow, labels: Tensor | None, batch: int) -> None:
    """Raise ModelError for labels that the model does not have; -1 (no label) is always valid."""
    if labels is None:
        return
    classes = model.config.num_classes
    if labels.shape != (batch,):
        raise ModelError(f"labels must have shape [{batch}], got {list(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= max(classes, 0):
        bad = low if low < -1 else high
        if not (classes == 0 and high == -1):
            raise ModelError(
                f"label {bad} is outside the model's {classes} classes (0..{classes - 1}, or -1 for no label)"
            )


def invert_block(block: FlowBlock, z: Tensor, labels: Tensor | None, guidance: Guidance) -> Tensor:
    """Invert one block: z [N, T, D] -> x [N, T, D], by x_i = z_i * exp(a_i) + b_i for i = 0, 1, ... in turn."""
    x = block.order(z).clone()
    EagerBlock(block, labels, z.shape[0], guidance).invert(x)
    return block.order(x)
