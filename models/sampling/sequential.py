"""The way back, from noise to images: token by token, with a key-value cache and guidance (paper, sections 3.3, 3.5).

Guidance runs the conditional and the unconditional half as one batch of 2N rows.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tarflow.models.errors import ModelError
from tarflow.models.flow import FlowBlock, TarFlow
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.transformer import empty_cache

# Not cuDNN's: it plans anew for each length, and here every token has its own. On an H100 that was six sevenths of the time.
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def check_labels(model: TarFlow, y: Tensor | None, batch: int) -> None:
    """Refuse labels that the model does not have; -1 (no label) is always fine."""
    if y is None:
        return
    classes = model.config.num_classes
    if y.shape != (batch,):
        raise ModelError(f"labels must have shape [{batch}], got {list(y.shape)}")
    low, high = int(y.min()), int(y.max())
    if low < -1 or high >= max(classes, 0):
        bad = low if low < -1 else high
        if not (classes == 0 and high == -1):
            raise ModelError(
                f"label {bad} is outside the model's {classes} classes (0..{classes - 1}, or -1 for no label)"
            )


@torch.inference_mode()
def sample(
    model: TarFlow,
    noise: Tensor,
    y: Tensor | None = None,
    guidance: Guidance | None = None,
    sequence: list[Tensor] | None = None,
) -> Tensor:
    """Standard normal noise [N, T, D], labels [N] (-1 = no label) -> images [N, C, H, W], float32, not clipped.

    A list given as `sequence` receives the images after 0, 1, ... blocks: the trajectory from noise to image.
    Row i of the result depends on row i of the noise and of the labels alone.
    """
    guidance = guidance or Guidance()
    check_labels(model, y, noise.shape[0])
    x = noise.float() * model.var.float().sqrt()
    if sequence is not None:
        sequence.append(model.unpatchify(x))
    for block in reversed(model.blocks):
        x = invert_block(block, x, y, guidance)  # type: ignore[arg-type]
        if sequence is not None:
            sequence.append(model.unpatchify(x))
    return model.unpatchify(x)


@sdpa_kernel(KERNELS, set_priority=True)
def invert_block(block: FlowBlock, z: Tensor, y: Tensor | None, guidance: Guidance) -> Tensor:
    """One block backwards: z [N, T, D] -> x [N, T, D], by x_i = z_i * exp(a_i) + b_i for i = 0, 1, ... in turn."""
    n, tokens, _ = z.shape
    x = block.order(z).clone()
    guided = guidance.active
    rows = 2 * n if guided else n
    embedding, inverse_temp = _conditions(block, y, n, guidance)
    position_embedding = block.order(block.pos_embed, dim=0)
    config = block.config
    cache = empty_cache(config.layers_per_block, rows, config.num_heads, tokens, config.head_channels, block.pos_embed)
    for i in range(tokens - 1):
        token = x[:, i : i + 1].to(block.proj_in.weight.dtype)
        h = block.proj_in(token) + position_embedding[i]
        if guided:
            h = torch.cat([h, h])
        if embedding is not None:
            h = h + embedding
        for layer, layer_cache in zip(block.attn_blocks, cache):
            h = layer.step(h, layer_cache, i, inverse_temp)  # type: ignore[operator]
        a, b = block.split(block.proj_out(h)[:, 0])
        if guided:
            weight = guidance.weight * (i + 1) / (tokens - 1) if guidance.annealed else guidance.weight
            a, b = (_guide(value, weight, name in guidance.what) for name, value in (("a", a), ("b", b)))
        x[:, i + 1] = x[:, i + 1] * torch.exp(a) + b
    return block.order(x)


def _guide(value: Tensor, weight: float, wanted: bool) -> Tensor:
    """The linear rule on rows [conditional, unconditional] -> conditional rows."""
    conditional, unconditional = value.chunk(2)
    return conditional + weight * (conditional - unconditional) if wanted else conditional


def _conditions(block: FlowBlock, y: Tensor | None, n: int, guidance: Guidance) -> tuple[Tensor | None, Tensor | None]:
    """Label embedding and inverse attention temperature of every row, conditional rows first."""
    embedding = block.label_embedding(y, n)
    if not guidance.active:
        return embedding, None
    if embedding is not None:
        no_label = block.label_embedding(None, n)
        assert no_label is not None
        embedding = torch.cat([embedding, no_label])
    if guidance.attn_temp == 1.0:
        return embedding, None
    inverse_temp = torch.ones(2 * n, 1, 1, 1, dtype=block.pos_embed.dtype, device=block.pos_embed.device)
    inverse_temp[n:] = 1 / guidance.attn_temp
    return embedding, inverse_temp
