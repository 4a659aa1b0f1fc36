"""The transformer inside a flow block: pre-norm causal attention and a GELU MLP.

Tensor names carry shape suffixes: B batch, T tokens, C channels, H heads, K channels of a head.
Parameter names follow the published checkpoints (`attention.qkv.weight`, `mlp.main.0.weight`, ...).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORT = 256  # up to this many tokens, torch's fused bfloat16 kernel on the CPU is slower than explicit products


def causal_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v with token t seeing tokens 0..t; [B, H, T, K] as the inputs.

    Short bfloat16 sequences on the CPU use explicit products, for which autograd keeps T x T probabilities per head.
    """
    B, H, T, K = q_BHTK.shape
    if q_BHTK.device.type != "cpu" or q_BHTK.dtype != torch.bfloat16 or T > SHORT:
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
    mask_TT = q_BHTK.new_full((T, T), float("-inf")).triu(1)
    q, k, v = (t.reshape(B * H, T, K) for t in (q_BHTK, k_BHTK, v_BHTK))
    logits = torch.baddbmm(mask_TT, q, k.transpose(1, 2), alpha=K**-0.5)  # mask and scale in the same pass
    return (logits.softmax(-1) @ v).view(B, H, T, K)


class CausalAttention(nn.Module):
    """Pre-norm multi-head attention; token t sees tokens 0..t. No mask is stored."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.num_heads = channels // head_channels
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def _heads(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x_BTC.shape
        qkv_BTHK = self.qkv(self.norm(x_BTC)).view(B, T, 3 * self.num_heads, -1)
        q, k, v = qkv_BTHK.transpose(1, 2).chunk(3, dim=1)
        return q, k, v

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Attention over whole sequences, [B, T, C] -> [B, T, C]."""
        q, k, v = self._heads(x_BTC)
        out_BHTK = causal_attention(q, k, v)
        return self.proj(out_BHTK.transpose(1, 2).flatten(2))

    def step(self, x_BNC: Tensor, cache_2BHTK: Tensor, first: int | Tensor, inverse_temp_B111: Tensor | None) -> Tensor:
        """Attention of the N tokens from `first` on; the cache holds keys and values of the tokens before them.

        `first` is one position for all rows, or int64 [B]; theirs go into the cache. `inverse_temp_B111` multiplies the
        attention logits of each row of the batch (1 / attention temperature).
        """
        q, k, v = self._heads(x_BNC)
        if inverse_temp_B111 is not None:
            q = q * inverse_temp_B111
        out_BHNK = _attend(q, k, v, cache_2BHTK, first)
        return self.proj(out_BHNK.transpose(1, 2).flatten(2))


def _attend(q: Tensor, k: Tensor, v: Tensor, cache_2BHTK: Tensor, first: int | Tensor) -> Tensor:
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
    end = int(first.max()) + N
    seen = torch.arange(end, device=q.device) <= position_BN[:, None, :, None]
    keys, values = cache_2BHTK[:, :, :, :end]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)


class MLP(nn.Module):
    """Pre-norm two-layer perceptron with GELU."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(
            nn.Linear(channels, expansion * channels), nn.GELU(), nn.Linear(expansion * channels, channels)
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C], each token alone."""
        return self.main(self.norm(x_BTC))


class TransformerLayer(nn.Module):
    """x + attention(x), then x + mlp(x). The unit that activation checkpointing, compile and sharding act on."""

    def __init__(self, channels: int, head_channels: int, expansion: int) -> None:
        super().__init__()
        self.attention = CausalAttention(channels, head_channels)
        self.mlp = MLP(channels, expansion)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        x_BTC = x_BTC + self.attention(x_BTC)
        return x_BTC + self.mlp(x_BTC)

    def step(self, x_BNC: Tensor, cache_2BHTK: Tensor, first: int | Tensor, inverse_temp_B111: Tensor | None) -> Tensor:
        """The layer for N tokens in a row; see `CausalAttention.step`."""
        x_BNC = x_BNC + self.attention.step(x_BNC, cache_2BHTK, first, inverse_temp_B111)
        return x_BNC + self.mlp(x_BNC)


def empty_cache(layers: int, batch: int, heads: int, tokens: int, head_channels: int, like: Tensor) -> Tensor:
    """A key-value cache for one block: [layers, 2, B, H, T, K] in the dtype and on the device of `like`.

    Zeros: what is masked is still multiplied by its weight of 0, which a NaN in fresh memory would survive.
    """
    return torch.zeros(layers, 2, batch, heads, tokens, head_channels, dtype=like.dtype, device=like.device)
