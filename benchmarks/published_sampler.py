"""The baseline of `benchmarks.sampling`: guided sampling the way the published implementation goes about it.

A cache that grows by concatenation, keys and values of every layer in turn, and two passes of the network for each token:
one with the label, one without. Computes with our modules' weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.models.flow import TarFlow


class GrowingCache:
    """Keys and values [N, H, t, K] of each layer, for the conditional and the unconditional pass."""

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        old_k, old_v = self.keys[layer], self.values[layer]
        keys = k if old_k is None else torch.cat([old_k, k], dim=2)
        values = v if old_v is None else torch.cat([old_v, v], dim=2)
        self.keys[layer], self.values[layer] = keys, values
        return keys, values


def one_pass(block: Any, token: Tensor, position: Tensor, y: Tensor | None, cache: GrowingCache) -> Tensor:
    """The network's output [N, 1, 2D] for one token [N, 1, D]."""
    h = block.proj_in(token) + position + block.label_embedding(y, len(token))
    for i, layer in enumerate(block.attn_blocks):
        attention = layer.attention
        n, t, _ = h.shape
        qkv = attention.qkv(attention.norm(h.float()).type(h.dtype))
        q, k, v = qkv.reshape(n, t, 3 * attention.num_heads, -1).transpose(1, 2).chunk(3, dim=1)
        keys, values = cache.append(i, k, v)
        seen = F.scaled_dot_product_attention(q, keys, values)
        h = h + attention.proj(seen.transpose(1, 2).reshape(n, t, -1))
        h = h + layer.mlp.main(layer.mlp.norm(h.float()).type(h.dtype))
    out: Tensor = block.proj_out(h)
    return out


@torch.no_grad()
def sample(model: TarFlow, noise: Tensor, y: Tensor, guidance: float) -> Tensor:
    """Noise [N, T, D], labels [N] -> images [N, C, H, W]; the guidance weight grows over the tokens."""
    x = noise
    for block in reversed(model.blocks):
        b: Any = block
        x = b.order(x).clone()
        positions = b.order(b.pos_embed, dim=0)
        caches = [GrowingCache(len(b.attn_blocks)) for _ in range(2)]
        tokens = x.shape[1]
        for i in range(tokens - 1):
            token, position = x[:, i : i + 1], positions[i : i + 1]
            scale, shift = one_pass(b, token, position, y, caches[0]).chunk(2, dim=-1)
            scale_u, shift_u = one_pass(b, token, position, None, caches[1]).chunk(2, dim=-1)
            w = guidance * (i + 1) / (tokens - 1)
            scale, shift = scale + w * (scale - scale_u), shift + w * (shift - shift_u)
            x[:, i + 1] = x[:, i + 1] * torch.exp(scale[:, 0].float()).type(scale.dtype) + shift[:, 0]
        x = b.order(x)
    return model.unpatchify(x)
