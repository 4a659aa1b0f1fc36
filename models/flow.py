"""TarFlow: a stack of autoregressive affine blocks on image patches (arXiv 2412.06329, section 2).

Data run through the flow in float32 (`x`, `a`, `b`, `exp`, log-determinant); only the transformer inside a block
computes in the dtype of its weights. With `exp(a)` in bf16 the flow and its inverse would disagree.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tarflow.models.config import TarFlowConfig
from tarflow.models.errors import ModelError
from tarflow.models.noise import NoiseEmbedding
from tarflow.models.transformer import TransformerLayer, rotary_table

# The softplus scale: its lower bound, and the output at which softplus is 1.
LEAST_SCALE, UNIT = 1e-3, math.log(math.e - 1)
PRIOR_MOMENTUM = 0.1  # of the learned prior variance of the volume-preserving flow, as published


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[N, C, H, W] -> [N, T, D]: patches row by row, the numbers of a patch channel-major (C, p, p)."""
    n, c, h, w = images.shape
    p = patch_size
    grid = images.reshape(n, c, h // p, p, w // p, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, (h // p) * (w // p), c * p * p)


def unpatchify(tokens: Tensor, patch_size: int, in_channels: int, grid: tuple[int, int]) -> Tensor:
    """[N, T, D] -> [N, C, H, W], the inverse of `patchify` for images of a grid of (rows, columns) patches."""
    (rows, columns), p = grid, patch_size
    patches = tokens.reshape(len(tokens), rows, columns, in_channels, p, p)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), in_channels, rows * p, columns * p)


class FlowBlock(nn.Module):
    """One autoregressive block: z = (x - b) * exp(-a), with (a, b) of a token computed from the tokens before it."""

    def __init__(self, config: TarFlowConfig, layers: int, reverse: bool) -> None:
        super().__init__()
        self.config = config
        self.reverse_order = reverse
        c = config.channels
        self.proj_in = nn.Linear(config.token_dim, c)
        learned = config.positions == "learned"
        self.pos_embed = nn.Parameter(torch.zeros(config.num_tokens, c)) if learned else None
        self.class_embed = nn.Parameter(torch.zeros(config.num_classes, 1, c)) if config.num_classes else None
        self.noise_embed = NoiseEmbedding(c) if config.noise_conditioning else None
        self.attn_blocks = nn.ModuleList(
            TransformerLayer(c, config.head_channels, config.expansion, config.qk_norm) for _ in range(layers)
        )
        self.proj_out = nn.Linear(c, config.token_dim * (2 if config.nvp else 1))

    def order(self, x: Tensor, dim: int = 1) -> Tensor:
        """The sequence in this block's order; its own inverse."""
        return x.flip(dim) if self.reverse_order else x

    def position_embedding(self) -> Tensor:
        """[T, C] in this block's order; [1, 1] zeros where positions are rotary."""
        weight = self.proj_in.weight
        return weight.new_zeros(1, 1) if self.pos_embed is None else self.order(self.pos_embed, dim=0)

    def rotary(self) -> Tensor | None:
        """The table [T, K] of rotary positions (`rotary_table`) in this block's order; None where positions are learned."""
        if self.pos_embed is not None:
            return None
        config = self.config
        return self.order(rotary_table(config.grid, config.head_channels, self.proj_in.weight.device), dim=0)

    def label_embedding(self, y: Tensor | None, batch: int) -> Tensor | None:
        """[N, 1, C] embedding of labels [N]; -1, or no labels at all, means "no label": the mean over the classes."""
        if self.class_embed is None:
            return None
        no_label = self.class_embed.mean(0, keepdim=True)
        if y is None:
            return no_label.expand(batch, -1, -1)
        return torch.where((y < 0).view(-1, 1, 1), no_label, self.class_embed[y.clamp(min=0)])

    def conditioning(self, y: Tensor | None, noise: Tensor | None, batch: int) -> Tensor | None:
        """[N, 1, C], what is added to every token: the embeddings of labels [N] and of noise levels [N]; None for neither.

        Raises ModelError where the block is not told the noise level that it needs, or is told one that it cannot use.
        """
        label = self.label_embedding(y, batch)
        if (self.noise_embed is None) != (noise is None):
            raise ModelError(
                "a model with model.noise_conditioning has to be told the noise level of its images"
                if noise is None
                else "a noise level was given to a model without model.noise_conditioning"
            )
        if self.noise_embed is None or noise is None:
            return label
        level = self.noise_embed(noise)
        return (level if label is None else label.to(level.dtype) + level).to(self.proj_in.weight.dtype)

    def split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the transformer -> (a, b) in float32: log-scale and shift of the *next* token."""
        out = out.float()
        if not self.config.nvp:
            return torch.zeros_like(out), out
        a, b = out.chunk(2, dim=-1)
        if self.config.scale == "softplus":
            a = torch.log(LEAST_SCALE + (1 - LEAST_SCALE) * F.softplus(a + UNIT))
        clip = self.config.soft_clip
        return (clip * torch.tanh(a / clip) if clip else a), b

    def scale_and_shift(
        self, x: Tensor, y: Tensor | None, recompute: bool = False, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(a, b), each [N, T, D] float32, of a sequence already in this block's order; token 0 gets zeros."""
        h = self.proj_in(x.to(self.proj_in.weight.dtype)) + self.position_embedding()
        embedding = self.conditioning(y, noise, x.shape[0])
        if embedding is not None:
            h = h + embedding
        table = self.rotary()
        rotary = () if table is None else (table,)
        for layer in self.attn_blocks:
            h = checkpoint(layer, h, *rotary, use_reentrant=False) if recompute else layer(h, *rotary)
        # Shift right by one: what the transformer says at token t is about token t + 1, and nothing is known of token 0.
        return self.split(F.pad(self.proj_out(h)[:, :-1], (0, 0, 1, 0)))

    def forward(
        self, x: Tensor, y: Tensor | None = None, recompute: bool = False, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """X [N, T, D], labels y [N], noise levels [N] -> (z [N, T, D], log-determinant per dimension [N])."""
        x = self.order(x)
        a, b = self.scale_and_shift(x, y, recompute, noise)
        z = (x - b) * torch.exp(-a)
        return self.order(z), -a.mean(dim=(1, 2))


class TarFlow(nn.Module):
    """The whole flow. `forward` maps images to latents; the inverse is `tarflow.models.sampling.sequential.sample`."""

    var: Tensor

    def __init__(self, config: TarFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(FlowBlock(config, layers, bool(i % 2)) for i, layers in enumerate(config.layers))
        self.register_buffer("var", torch.ones(config.num_tokens, config.token_dim))

    def patchify(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, T, D] with the model's patch size, times `input_scale`."""
        tokens = patchify(images, self.config.patch_size)
        return tokens if self.config.input_scale == 1 else tokens * self.config.input_scale

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """[N, T, D] -> [N, C, H, W], the inverse of `patchify`."""
        images = unpatchify(tokens, self.config.patch_size, self.config.in_channels, self.config.grid)
        return images if self.config.input_scale == 1 else images / self.config.input_scale

    def forward(
        self,
        images: Tensor,
        y: Tensor | None = None,
        outputs: list[Tensor] | None = None,
        recompute: bool = False,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Images [N, C, H, W] in [-1, 1], labels [N] (-1 = no label) -> (z [N, T, D], logdet [N]), float32.

        `noise` [N]: with `noise_conditioning`, the standard deviation of the noise that each image contains.

        `logdet` is the log-determinant per dimension (a mean, not a sum), summed over blocks. A list given as
        `outputs` receives every block's output [N, T, D]. `recompute`: keep only each layer's input for the backward
        pass and compute the rest again, to the same bits.
        """
        z = self.patchify(images.float())
        logdet = z.new_full((z.shape[0],), self.scale_logdet)
        for block in self.blocks:
            z, block_logdet = block(z, y, recompute, noise)
            logdet = logdet + block_logdet
            if outputs is not None:
                outputs.append(z)
        return z, logdet

    @property
    def scale_logdet(self) -> float:
        """Log-determinant per dimension of the input scale."""
        return math.log(self.config.input_scale)

    @torch.no_grad()
    def update_prior(self, mean_square: Tensor) -> None:
        """Move the prior's variance [T, D] towards the batch's mean of z^2 (volume-preserving flow only).

        A batch with non-finite numbers changes nothing; nothing here waits for the device.
        """
        good = torch.isfinite(mean_square).all()
        self.var.lerp_(torch.where(good, mean_square.to(self.var), self.var), PRIOR_MOMENTUM)


def flow_loss(z: Tensor, logdet: Tensor) -> Tensor:
    """Negative log-likelihood per image [N] in nats per dimension, without the constant (paper, equation 6)."""
    return 0.5 * z.square().mean(dim=(1, 2)) - logdet
