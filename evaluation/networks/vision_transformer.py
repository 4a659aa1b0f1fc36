"""A vision transformer as DINOv2 publishes it (Oquab et al., arXiv 2304.07193), from a file of weights.

The file decides width, depth, patch and registers; heads have 64 channels throughout the family. The feature of an image
is its class token after the last norm.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.networks.weights_file import fill

HEAD = 64
SIZE = 224
MAX_DEPTH = 100  # blocks; the largest of the family has 40
_OFFSET = 0.1  # as in the published code: positions are scaled by (n + 0.1) / m, not n / m


class Attention(nn.Module):
    """Full self-attention, heads of 64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> the same shape."""
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width))
        return mixed


class Mlp(nn.Module):
    """GELU between two linear maps."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class GatedMlp(nn.Module):
    """SwiGLU, which the largest of the family uses."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> the same shape."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class Scale(nn.Module):
    """A factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> the same shape."""
        return x * self.gamma


class Block(nn.Module):
    """x + scaled attention, then x + scaled MLP, each after a norm."""

    def __init__(self, width: int, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width), mlp
        self.ls1, self.ls2 = Scale(width), Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class VisionTransformer(nn.Module):
    """[N, 3, H, W] normalised -> [N, width]; H and W multiples of the patch."""

    def __init__(self, width: int, depth: int, patch: int, positions: int, registers: int, hidden: int, gated: bool):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.registers = registers
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        mlp = GatedMlp if gated else Mlp
        self.blocks = nn.ModuleList(Block(width, mlp(width, hidden)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dim = width

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> the class token after the last norm, [N, width]."""
        patches = self.patch_embed["proj"](x)
        rows, columns = patches.shape[2:]
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        tokens = tokens + self._positions(rows, columns)
        if self.registers:
            tokens = torch.cat([tokens[:, :1], self.register_tokens.expand(len(x), -1, -1), tokens[:, 1:]], 1)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.norm(tokens[:, 0])
        return out

    def _positions(self, rows: int, columns: int) -> Tensor:
        """[1, 1 + rows * columns, width]: as stored, or interpolated as in the published code."""
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if (rows, columns) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].view(1, side, side, self.dim).permute(0, 3, 1, 2)
        factors = ((rows + _OFFSET) / side, (columns + _OFFSET) / side)
        # Sampled by the factor itself, not by the ratio of the two sizes.
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def from_weights(tensors: Mapping[str, Tensor], origin: str) -> VisionTransformer:
    """The transformer whose tensors a file holds. Raises EvaluationError for a file of something else."""
    try:
        width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        positions = tensors["pos_embed"].shape[1]
        gated = "blocks.0.mlp.w12.weight" in tensors
        hidden = tensors["blocks.0.mlp.w3.weight"].shape[1] if gated else tensors["blocks.0.mlp.fc1.weight"].shape[0]
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    except (KeyError, ValueError, IndexError):
        raise EvaluationError(
            f"{origin} does not hold a vision transformer in DINOv2's layout (patch_embed.proj, pos_embed, blocks.0.mlp ...)"
        ) from None
    side = math.isqrt(max(positions - 1, 0))
    if depth > MAX_DEPTH or not width or width % HEAD or not patch or side * side != positions - 1 or not side:
        raise EvaluationError(
            f"{origin} does not hold a vision transformer of DINOv2's family: {depth} blocks of width {width}, "
            f"patches of {patch}, {positions} positions"
        )
    with torch.device("meta"):  # allocates nothing before the shapes are known to match
        network = VisionTransformer(width, depth, patch, positions, registers, hidden, gated)
    fill(network, tensors, origin, beside=("mask_token",))  # used in training only
    return network
