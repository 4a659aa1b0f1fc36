"""The transformer inside a flow block: pre-norm causal attention and a GELU MLP.

Tensor names carry shape suffixes: B batch, T tokens, C channels, H heads, K channels of a head.
Parameter names follow the published checkpoints (`attention.qkv.weight`, `mlp.main.0.weight`, ...).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = (
    100.0  # as in arXiv 2403.13298: in heads of 64 channels, pairs turn by 1 to 1/75 radian from patch to patch
)
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


def rotary_table(grid: tuple[int, int], head_channels: int, device: torch.device) -> Tensor:
    """Cosines and sines [T, K] float32 of the rotary positions on a grid of (rows, columns) patches, in row-major order.

    Axial (arXiv 2403.13298): the first half of a head's K channels serves rows, the second columns. In each half channel j is
    paired with channel j + K / 4, j = 0 .. K / 4 - 1, and the pair is rotated by the angle ROTARY_BASE^(-4 j / K) times the
    row, or the column, counted in patches. A row of the table holds K / 2 cosines, those of rows first, and then the sines.
    """
    rows, columns = (torch.arange(side, dtype=torch.float32, device=device) for side in grid)
    pairs = head_channels // 4
    rates = ROTARY_BASE ** (-torch.arange(pairs, dtype=torch.float32, device=device) / pairs)
    places = torch.cartesian_prod(rows, columns).view(-1, 2, 1)
    angles = (places * rates).flatten(1)
    return torch.cat([angles.cos(), angles.sin()], 1)


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """Queries or keys [..., K] rotated by a table [..., K] of their positions; in the dtype of x, computed in float32."""
    cosines, sines = (part.unflatten(-1, (2, -1)) for part in table.chunk(2, -1))
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack([a * cosines - b * sines, a * sines + b * cosines], -2).flatten(-3).to(x.dtype)


def compared(x: Tensor, norm: nn.Module | None, table: Tensor | None) -> Tensor:
    """Queries or keys [..., K] as attention compares them: normalized and rotated, if the model has it so."""
    if norm is not None:
        x = norm(x).to(x.dtype)
    return x if table is None else rotated(x, table)


class CausalAttention(nn.Module):
    """Pre-norm multi-head attention; token t sees tokens 0..t. No mask is stored."""

    def __init__(self, channels: int, head_channels: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(head_channels, bias=False) if qk_norm else None
        self.k_norm = nn.LayerNorm(head_channels, bias=False) if qk_norm else None
        self.num_heads = channels // head_channels
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x_BTC: Tensor, rotary_TK: Tensor | None = None) -> Tensor:
        """Attention over whole sequences, [B, T, C] -> [B, T, C]; with rotary positions, their table in the tokens' order."""
        B, T, _ = x_BTC.shape
        qkv_BTHK = self.qkv(self.norm(x_BTC)).view(B, T, 3 * self.num_heads, -1)
        q, k, v = qkv_BTHK.transpose(1, 2).chunk(3, dim=1)
        out_BHTK = causal_attention(compared(q, self.q_norm, rotary_TK), compared(k, self.k_norm, rotary_TK), v)
        return self.proj(out_BHTK.transpose(1, 2).flatten(2))


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

    def __init__(self, channels: int, head_channels: int, expansion: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.attention = CausalAttention(channels, head_channels, qk_norm)
        self.mlp = MLP(channels, expansion)

    def forward(self, x_BTC: Tensor, rotary_TK: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]; `rotary_TK` as in `CausalAttention`."""
        x_BTC = x_BTC + self.attention(x_BTC, rotary_TK)
        return x_BTC + self.mlp(x_BTC)
