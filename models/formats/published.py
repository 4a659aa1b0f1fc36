"""The published layout of weights (`.pth`): a dictionary of tensors whose shapes alone determine the model.

Every block also has a buffer `attn_mask`, a lower triangle of ones. The model here needs none; the published code expects
them when it loads strictly.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from tarflow.image_size import FORM, Size, is_size, shown, sides
from tarflow.models.config import TarFlowConfig
from tarflow.models.errors import ModelError
from tarflow.settings import first_reason

WITHOUT_SHAPE: Mapping[str, Any] = {
    "head_channels": 64,
    "soft_clip": 0.0,
    "scale": "exp",
    "input_scale": 1.0,
}  # as in every published model
_LAYER = re.compile(r"blocks\.([0-9]{1,9})\.attn_blocks\.([0-9]{1,9})\..*")


def attention_masks(config: TarFlowConfig) -> dict[str, Tensor]:
    """The buffers `attn_mask` [T, T] of all blocks; they share one storage, in a file too."""
    mask = torch.ones(config.num_tokens, config.num_tokens).tril()
    return {f"blocks.{block}.attn_mask": mask for block in range(config.num_blocks)}


def without_masks(config: TarFlowConfig, weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors without those buffers. Raises ModelError for a mask other than the causal one, which is built in here."""
    masks = {f"blocks.{block}.attn_mask" for block in range(config.num_blocks)}
    for name in masks & weights.keys():
        mask, size = weights[name], (config.num_tokens, config.num_tokens)
        if mask.shape != size or not torch.equal(mask.float(), torch.ones(size).tril()):
            raise ModelError(
                f"{where}: {name} is not the lower triangle of ones that makes this model's attention causal"
            )
    return {name: tensor for name, tensor in weights.items() if name not in masks}


def config_by_shapes(
    weights: Mapping[str, Tensor],
    where: str,
    like: TarFlowConfig | None = None,
    stated: Mapping[str, Any] | None = None,
) -> TarFlowConfig:
    """Infer the configuration from tensors in the published layout.

    Four settings affect no shape (`WITHOUT_SHAPE`): the channels of attention heads, unless queries and keys have a norm, the
    soft clip, the form of the scale, and the factor on the images. They are as `stated`, or else those of `like`, or else as
    published. So are the sides of a rectangle, of which shapes tell the product alone: the images are squares, as published,
    unless `stated` or `like` say otherwise. Without an embedding of positions these are rotary.

    Raises ModelError for tensors of another layout.
    """
    free = {name: getattr(like, name) for name in WITHOUT_SHAPE} if like else dict(WITHOUT_SHAPE)
    free |= {name: value for name, value in (stated or {}).items() if name in WITHOUT_SHAPE}
    layers: dict[int, int] = {}  # block -> how many
    for match in map(_LAYER.fullmatch, weights):
        if match:
            layers[int(match[1])] = max(layers.get(int(match[1]), 0), 1 + int(match[2]))
    try:
        channels, token_dim = weights["blocks.0.proj_in.weight"].shape
        positions = "learned" if "blocks.0.pos_embed" in weights else "rotary"
        table = weights["blocks.0.pos_embed"] if positions == "learned" else weights.get("var")
        num_tokens = None if table is None else table.shape[0]
        # D = in_channels * patch_size^2 is 3 p^2 or p^2, never both: their ratio 3 is not a square.
        in_channels = 3 if token_dim % 3 == 0 and math.isqrt(token_dim // 3) ** 2 == token_dim // 3 else 1
        patch_size = math.isqrt(token_dim // in_channels)
        classes = weights.get("blocks.0.class_embed")
        q_norm = weights.get("blocks.0.attn_blocks.0.attention.q_norm.weight")
        if q_norm is not None:  # it has a number for each channel of a head
            free["head_channels"] = q_norm.shape[0]
        return TarFlowConfig(
            image_size=_image_size(num_tokens, patch_size, stated or {}, like),
            patch_size=patch_size,
            in_channels=in_channels,
            channels=channels,
            num_blocks=1 + max(layers),
            layers_per_block=tuple(number for _, number in sorted(layers.items())),
            expansion=weights["blocks.0.attn_blocks.0.mlp.main.0.weight"].shape[0] // channels,
            num_classes=0 if classes is None else classes.shape[0],
            nvp=weights["blocks.0.proj_out.weight"].shape[0] == 2 * token_dim,
            positions=positions,
            qk_norm=q_norm is not None,
            noise_conditioning=any(name.startswith("blocks.0.noise_embed.") for name in weights),
            **free,
        )
    except KeyError as error:
        raise ModelError(f"{where} is not laid out as published TarFlow weights are: {error} is missing") from None
    except (ValueError, IndexError, ZeroDivisionError, ValidationError) as error:
        reason = first_reason(error) if isinstance(error, ValidationError) else str(error)
        raise ModelError(f"{where} does not determine a model by the shapes of its tensors: {reason}") from None


def _image_size(num_tokens: int | None, patch: int, stated: Mapping[str, Any], like: TarFlowConfig | None) -> Size:
    """The size of images of so many patches (None: no tensor shows it).

    Raises ValueError where nothing says it, or these make no square and nothing says what they make.
    """
    for size in (stated.get("image_size"), like and like.image_size):
        if is_size(size) and num_tokens in (None, math.prod(side / patch for side in sides(size))):
            return size
    if num_tokens is None:
        raise ValueError(
            "no tensor shows how many patches an image has (rotary positions have no table, and the prior's variance is left "
            f"out): say --model image_size=SIZE ({FORM}), or for --init-from set model.image_size as there"
        )
    rows = math.isqrt(num_tokens)
    if rows**2 == num_tokens:
        return rows * patch
    said = stated.get("image_size")
    known = f", nor images of {shown(said)} pixels in patches of {patch}" if is_size(said) else ""
    raise ValueError(
        f"its {num_tokens} positions make no square{known}, and of a rectangle shapes do not tell the sides: say "
        f"--model image_size=SIZE ({FORM}), or for --init-from set model.image_size as there"
    )
