"""A baseline of `benchmarks.train_step`: the training step as anyone would write it with torch's own parts.

`nn.Linear`, `F.scaled_dot_product_attention(is_causal=True)`, torch's fused AdamW; in bfloat16 the weights are cast once
per step from float32 masters, as ours are. The same parameters under the same names, the same flow around the layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import FlowBlock, TarFlow, flow_loss


class PlainAttention(nn.Module):
    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3 * self.heads, -1).transpose(1, 2).chunk(3, dim=1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))


class PlainMLP(nn.Module):
    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(
            nn.Linear(channels, expansion * channels), nn.GELU(), nn.Linear(expansion * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(self.norm(x))


class PlainLayer(nn.Module):
    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        self.attention = PlainAttention(config.channels, config.head_channels)
        self.mlp = PlainMLP(config.channels, config.expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class PlainTrainer:
    """The flow around plain layers, and its step."""

    def __init__(self, config: TarFlowConfig, weights: dict[str, Tensor], dtype: torch.dtype, lr: float) -> None:
        self.model = TarFlow(config)
        for block in self.model.blocks:
            assert isinstance(block, FlowBlock)
            block.attn_blocks = nn.ModuleList(PlainLayer(config) for _ in block.attn_blocks)
        self.model.load_state_dict(weights)
        self.weights = list(self.model.parameters())
        # In float32 the weights are their own masters.
        self.masters = [w if dtype == torch.float32 else nn.Parameter(w.detach().clone()) for w in self.weights]
        self.model.to(dtype)
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)

    def step(self, x: Tensor, y: Tensor) -> float:
        z, logdet = self.model(x, y)
        loss = flow_loss(z, logdet).mean()
        loss.backward()
        copies = [(m, w) for m, w in zip(self.masters, self.weights) if m is not w]
        for master, weight in copies:
            assert weight.grad is not None
            master.grad = weight.grad.float()
        self.optimizer.step()
        self.model.zero_grad()
        with torch.no_grad():
            for master, weight in copies:
                weight.copy_(master)
        return loss.item()
