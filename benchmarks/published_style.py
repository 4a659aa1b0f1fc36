"""The baseline of `benchmarks.train_step`: a training step the way the published implementation goes about it.

Dense attention mask, autocast, norms with separate casts, a synchronisation per block for the labels, AdamW parameter by
parameter, a barrier and `.item()` for each metric in each step. The same parameters under the same names as ours.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import patchify


class DenseAttention(nn.Module):
    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, c = x.shape
        x = self.norm(x.float()).type(x.dtype)
        q, k, v = self.qkv(x).reshape(b, t, 3 * self.heads, -1).transpose(1, 2).chunk(3, dim=1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool())
        return self.proj(x.transpose(1, 2).reshape(b, t, c))


class DenseMLP(nn.Module):
    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(
            nn.Linear(channels, expansion * channels), nn.GELU(), nn.Linear(expansion * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(self.norm(x.float()).type(x.dtype))


class DenseLayer(nn.Module):
    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        self.attention = DenseAttention(config.channels, config.head_channels)
        self.mlp = DenseMLP(config.channels, config.expansion)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(x, mask)
        return x + self.mlp(x)


class DenseBlock(nn.Module):
    attn_mask: Tensor

    def __init__(self, config: TarFlowConfig, layers: int, reverse: bool) -> None:
        super().__init__()
        self.reverse = reverse
        self.proj_in = nn.Linear(config.token_dim, config.channels)
        self.pos_embed = nn.Parameter(torch.zeros(config.num_tokens, config.channels))
        self.class_embed = nn.Parameter(torch.zeros(config.num_classes, 1, config.channels))
        self.attn_blocks = nn.ModuleList(DenseLayer(config) for _ in range(layers))
        self.proj_out = nn.Linear(config.channels, 2 * config.token_dim)
        self.register_buffer(
            "attn_mask", torch.tril(torch.ones(config.num_tokens, config.num_tokens)), persistent=False
        )

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        def flip(tokens: Tensor, dim: int) -> Tensor:
            return tokens.flip(dim) if self.reverse else tokens

        x = flip(x, 1)
        inputs = x
        x = self.proj_in(x) + flip(self.pos_embed, 0)
        if (y < 0).any():  # the device is waited for here
            dropped = (y < 0).float().view(-1, 1, 1)
            x = x + (1 - dropped) * self.class_embed[y] + dropped * self.class_embed.mean(0)
        else:
            x = x + self.class_embed[y]
        for layer in self.attn_blocks:
            x = layer(x, self.attn_mask)
        x = self.proj_out(x)
        x = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        a, b = x.chunk(2, dim=-1)
        scale = (-a.float()).exp().type(a.dtype)
        return flip((inputs - b) * scale, 1), -a.mean(dim=[1, 2])


class DenseTrainer:
    """Model, optimizer and step of the baseline."""

    def __init__(self, config: TarFlowConfig, weights: dict[str, Tensor], dtype: torch.dtype, lr: float) -> None:
        self.config, self.dtype = config, dtype
        self.blocks = nn.ModuleList(DenseBlock(config, n, bool(i % 2)) for i, n in enumerate(config.layers))
        self.blocks.load_state_dict({k.removeprefix("blocks."): v for k, v in weights.items() if k != "var"})
        self.optimizer = torch.optim.AdamW(
            self.blocks.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1e-4, foreach=False, fused=False
        )

    def step(self, x: Tensor, y: Tensor) -> dict[str, float]:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            z, logdet = patchify(x, self.config.patch_size), torch.zeros(())
            for block in self.blocks:
                z, block_logdet = block(z, y)
                logdet = logdet + block_logdet
            mse = z.square().mean()
            loss = 0.5 * mse - logdet.mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        metrics = {"loss": loss.item(), "mse": mse.item(), "logdet": logdet.mean().item()}
        dist.barrier()
        return metrics
