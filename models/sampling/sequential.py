"""Sampling: each block inverted token by token with a key-value cache (arXiv 2412.06329, sections 2.2 and 2.6).

Guidance runs the conditional and the unconditional half as one batch of 2N rows.
"""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tarflow.models.errors import ModelError
from tarflow.models.flow import FlowBlock, TarFlow
from tarflow.models.sampling.settings import SamplingSettings
from tarflow.models.transformer import empty_cache

# Without cuDNN's kernel, which plans anew for each length: here every token has its own, and planning took six sevenths of
# the time on an H100.
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
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
    for block in reversed(model.blocks):
        x = invert_block(block, x, labels, settings)  # type: ignore[arg-type]
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


@sdpa_kernel(KERNELS, set_priority=True)
def invert_block(block: FlowBlock, z: Tensor, labels: Tensor | None, settings: SamplingSettings) -> Tensor:
    """Invert one block: z [N, T, D] -> x [N, T, D], by x_i = z_i * exp(a_i) + b_i for i = 0, 1, ... in turn."""
    n, tokens, _ = z.shape
    config = block.config
    x = block.order(z).clone()  # inverted in place: x_i for tokens up to i, z_i for the rest
    rows = 2 * n if settings.guided else n
    embedding, inverse_temp = _conditions(block, labels, n, settings)
    position_embedding = block.order(block.pos_embed, dim=0)
    cache = empty_cache(config.layers_per_block, rows, config.num_heads, tokens, config.head_channels, block.pos_embed)

    # Token 0 is the identity; the network's output at token i is the scale and shift of token i + 1.
    for i in range(tokens - 1):
        token = x[:, i : i + 1].to(block.proj_in.weight.dtype)
        h = block.proj_in(token) + position_embedding[i]
        if settings.guided:
            h = torch.cat([h, h])  # the halves share the tokens and differ in label and temperature
        if embedding is not None:
            h = h + embedding
        for layer, layer_cache in zip(block.attn_blocks, cache):
            h = layer.step(h, layer_cache, i, inverse_temp)  # type: ignore[operator]
        a, b = block.split(block.proj_out(h)[:, 0])

        # Annealed, the weight of token j is w * j / (T - 1): none for the first token, all of it for the last.
        if settings.guided:
            weight = settings.guidance * (i + 1) / (tokens - 1) if settings.annealed else settings.guidance
            a, b = (_guide(value, weight, name in settings.guide) for name, value in (("a", a), ("b", b)))
        x[:, i + 1] = x[:, i + 1] * torch.exp(a) + b
    return block.order(x)


def _guide(value: Tensor, weight: float, wanted: bool) -> Tensor:
    """The linear rule on rows [conditional, unconditional] -> conditional rows."""
    conditional, unconditional = value.chunk(2)
    return conditional + weight * (conditional - unconditional) if wanted else conditional


def _conditions(
    block: FlowBlock, labels: Tensor | None, n: int, settings: SamplingSettings
) -> tuple[Tensor | None, Tensor | None]:
    """Label embedding and inverse attention temperature of every row, conditional rows first."""
    embedding = block.label_embedding(labels, n)
    if not settings.guided:
        return embedding, None
    if embedding is not None:
        no_label = block.label_embedding(None, n)
        assert no_label is not None
        embedding = torch.cat([embedding, no_label])
    if settings.attn_temp == 1.0:
        return embedding, None
    inverse_temp = torch.ones(2 * n, 1, 1, 1, dtype=block.pos_embed.dtype, device=block.pos_embed.device)
    inverse_temp[n:] = 1 / settings.attn_temp
    return embedding, inverse_temp
