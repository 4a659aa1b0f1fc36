"""A transformer layer over a key-value cache, which sampling calls for a token at a time.

At one token a call, a layer is a dozen products of a few rows: finding modules, parameters and slices costs as much. So
weights are looked up once, residuals are added inside the products, and a single float32 token on the CPU attends by plain
products: torch's fused kernel takes one and a half times as long for it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.models.transformer import TransformerLayer, compared


class CachedLayer:
    """A layer for B rows, with their cache."""

    def __init__(
        self,
        layer: TransformerLayer,
        cache_2BHTK: Tensor,
        inverse_temp_B111: Tensor | None,
        rotary_TK: Tensor | None = None,
    ) -> None:
        """`inverse_temp_B111` multiplies the attention logits of each row (1 / attention temperature).

        `rotary_TK`: the table of rotary positions in the order of the tokens.
        """
        attention, mlp = layer.attention, layer.mlp
        linears: list[Any] = [attention.qkv, attention.proj, mlp.main[0], mlp.main[2]]
        self.norms = [(norm.normalized_shape, norm.weight, norm.bias, norm.eps) for norm in (attention.norm, mlp.norm)]
        weights: list[tuple[Tensor, Tensor]] = [(linear.bias, linear.weight.t()) for linear in linears]
        self.qkv, self.proj, self.up, self.down = weights
        self.qk_norms, self.rotary = (attention.q_norm, attention.k_norm), rotary_TK
        self.cache, self.inverse_temp = cache_2BHTK, inverse_temp_B111
        _, self.rows, self.heads, _, k = cache_2BHTK.shape
        self.plain = cache_2BHTK.device.type == "cpu" and cache_2BHTK.dtype == torch.float32
        keys, values = cache_2BHTK.flatten(1, 2)
        self.keys_transposed, self.values = keys.transpose(1, 2), values
        self.scale = cache_2BHTK.new_full((self.rows, 1, 1), k**-0.5)
        if inverse_temp_B111 is not None:
            self.scale *= inverse_temp_B111[:, 0]

    def step(self, h_MC: Tensor, first: int | Tensor, count: int, seen: int | None = None) -> Tensor:
        """The layer for `count` tokens of each row, [B * count, C] -> the same tensor; theirs go into the cache.

        `first`: the position of the first of them, for all rows or int64 [B]. The cache holds all tokens before. `seen`: how
        many of its places are read where `first` is a tensor, if that is not to be looked up (a GPU would be waited for).
        """
        qkv = torch.addmm(self.qkv[0], torch.layer_norm(h_MC, *self.norms[0]), self.qkv[1])
        if self.rotary is not None or self.qk_norms[0] is not None:
            qkv = self._compared(qkv, first, count)
        if count == 1 and self.plain and isinstance(first, int):
            seen_MC = self._attend_one(qkv, first)
        else:
            seen_MC = self._attend(qkv.view(self.rows, count, 3 * self.heads, -1), first, seen)
        h_MC.addmm_(seen_MC, self.proj[1]).add_(self.proj[0])
        del qkv, seen_MC  # a pass over many tokens is at its widest below
        mid = torch.addmm(self.up[0], torch.layer_norm(h_MC, *self.norms[1]), self.up[1])
        # Transposed, which two rows or more are not contiguous by, so that torch does not go through oneDNN: that takes
        # several times as long for a few rows.
        mid = F.gelu(mid.t()).t() if count == 1 else F.gelu(mid)
        return h_MC.addmm_(mid, self.down[1]).add_(self.down[0])

    def _compared(self, qkv_MC: Tensor, first: int | Tensor, count: int) -> Tensor:
        """Projections [B * count, 3 C] of tokens, with queries and keys as attention compares them."""
        q, k, v = qkv_MC.view(self.rows, count, 3, self.heads, -1).unbind(2)
        table = None
        if self.rotary is not None:
            at = torch.arange(count, device=qkv_MC.device) + (first if isinstance(first, int) else first[:, None])
            table = self.rotary[at].unsqueeze(-2)  # [(B,) count, 1, K]
        q, k = (compared(x, norm, table) for x, norm in zip((q, k), self.qk_norms))
        return torch.stack([q, k, v], 2).view_as(qkv_MC)

    def _attend_one(self, qkv: Tensor, position: int) -> Tensor:
        """What one token of each row sees of the cache and of itself; [B, 3 C] -> [B, C]."""
        qkv_B3HK = qkv.view(self.rows, 3, self.heads, -1)
        self.cache.select(3, position).copy_(qkv_B3HK.narrow(1, 1, 2).transpose(0, 1))
        query = (qkv_B3HK.select(1, 0) * self.scale).view(len(self.values), 1, -1)
        seen = torch.bmm(query, self.keys_transposed.narrow(2, 0, position + 1)).softmax(-1)
        return torch.bmm(seen, self.values.narrow(1, 0, position + 1)).view(self.rows, -1)

    def _attend(self, qkv_BNHK: Tensor, first: int | Tensor, seen: int | None) -> Tensor:
        """What N tokens of each row see of the cache and of those up to themselves; [B, N, 3 H, K] -> [B * N, C]."""
        q, k, v = qkv_BNHK.transpose(1, 2).chunk(3, dim=1)
        if self.inverse_temp is not None:
            q = q * self.inverse_temp
        return _cached_attention(q, k, v, self.cache, first, seen).transpose(1, 2).flatten(2).flatten(0, 1)


def _cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache_2BHTK: Tensor, first: int | Tensor, end: int | None
) -> Tensor:
    """Write k and v [B, H, N, K] into the cache at `first`; what q sees of it and of the tokens up to itself."""
    N = q.shape[2]
    if isinstance(first, int):
        cache_2BHTK[0, :, :, first : first + N] = k
        cache_2BHTK[1, :, :, first : first + N] = v
        keys, values = cache_2BHTK[:, :, :, : first + N]
        if N == 1 or first == 0:
            return F.scaled_dot_product_attention(q, keys, values, is_causal=N > 1)
        seen = torch.ones(N, first + N, dtype=torch.bool, device=q.device).tril(first)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
    position_BN = first[:, None] + torch.arange(N, device=q.device)
    row_B1 = torch.arange(len(first), device=q.device)[:, None]
    cache_2BHTK[0].transpose(1, 2)[row_B1, position_BN] = k.transpose(1, 2)
    cache_2BHTK[1].transpose(1, 2)[row_B1, position_BN] = v.transpose(1, 2)
    end = int(first.max()) + N if end is None else end
    seen = torch.arange(end, device=q.device) <= position_BN[:, None, :, None]
    keys, values = cache_2BHTK[:, :, :, :end]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
