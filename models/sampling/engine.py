"""One block as the sampler sees it: a single call over a static cache, which every way of inverting the block goes through.

The network's output at token i is the scale and shift of token i + 1; token 0 is the identity. One token at a time is
sequential sampling, some at a time a sliding window, all of them the whole sequence, or the check of a finished one.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tarflow.models.flow import FlowBlock
from tarflow.models.sampling.cached_layer import CachedLayer
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.room import Room

# Without cuDNN's kernel, which plans anew for each length: here every token has its own, and planning took six sevenths of
# the time on an H100.
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


class BlockEngine(Protocol):
    """Computes one block for N samples. Sequences are in the block's own order (`FlowBlock.order`)."""

    def tokens(self, x: Tensor, first: int | Tensor, count: int) -> tuple[Tensor, Tensor]:
        """X [N, T, D] -> guided (a, b), each [N, count, D] float32, of the `count` tokens after token `first`.

        Reads the tokens first .. first + count - 1 of x and puts their keys and values into the cache, which must hold
        those of all tokens before. `first` is an int, or int64 [N] where the samples have come to different tokens.
        """
        ...

    def invert(self, x: Tensor) -> None:
        """Invert the block in place, one token after the other: z [N, T, D] becomes x."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these samples alone, int64 [n]; the cache keeps their rows."""
        ...


class EagerBlock:
    """The block in torch, on any device and in any dtype."""

    def __init__(
        self, block: FlowBlock, labels: Tensor | None, n: int, guidance: Guidance, room: Room | None = None
    ) -> None:
        """`labels`: [N] or None, as in `sample`. `room`: where the cache goes, if it is not to have memory of its own."""
        self.block, self.guidance = block, guidance
        config, self.n = block.config, n
        self.embedding, self.inverse_temp = conditions(block, labels, n, guidance)
        weight = block.proj_in.weight
        self.positions, self.rotary = block.position_embedding().expand(config.num_tokens, -1), block.rotary()
        rows, layers = 2 * n if guidance.active else n, len(block.attn_blocks)
        shape = layers, 2, rows, config.num_heads, config.num_tokens, config.head_channels
        self.cache, self.fresh = (room or Room()).take(shape, weight), True
        self.last = block.proj_out.bias, block.proj_out.weight.t()
        self._bind()

    def _bind(self) -> None:
        layers: Any = self.block.attn_blocks
        self.layers = [CachedLayer(*given, self.inverse_temp, self.rotary) for given in zip(layers, self.cache)]

    @sdpa_kernel(KERNELS, set_priority=True)
    def tokens(self, x: Tensor, first: int | Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `BlockEngine.tokens`."""
        writes_all = isinstance(first, int) and count >= self.cache.shape[4] - 1
        if self.fresh and not writes_all:
            self.cache.zero_()  # what is masked is still multiplied by its weight of 0, which a NaN from before would survive
        self.fresh = False
        return self._tokens(x, first, count)

    @sdpa_kernel(KERNELS, set_priority=True)
    def invert(self, x: Tensor) -> None:
        """See `BlockEngine.invert`."""
        self.fresh = False  # a token reads those before it and itself
        for i in range(x.shape[1] - 1):
            a, b = self._tokens(x, i, 1)
            x.select(1, i + 1).mul_(torch.exp(a.select(1, 0))).add_(b.select(1, 0))

    def _tokens(self, x: Tensor, first: int | Tensor, count: int, seen: int | None = None) -> tuple[Tensor, Tensor]:
        """`seen`: how many places of the cache are read, if not as many as have been written."""
        block = self.block
        if isinstance(first, int):
            some, positions = x[:, first : first + count], self.positions[first : first + count]
        else:
            index = first[:, None] + torch.arange(count, device=x.device)
            some = x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
            positions = self.positions[index]
        h, halves = block.proj_in(some.to(self.positions.dtype)) + positions, 2 if self.guidance.active else 1
        at = first if isinstance(first, int) else first.repeat(halves)
        # The halves share the tokens and differ in label and temperature.
        if self.embedding is not None:
            h = h + self.embedding.view(halves, self.n, 1, -1)
        elif halves == 2:
            h = torch.cat([h, h])
        h = h.reshape(halves * self.n * count, -1)
        for layer in self.layers:
            h = layer.step(h, at, count, seen)
        a, b = block.split(torch.addmm(self.last[0], h, self.last[1]).view(halves * self.n, count, -1))
        return self.guidance.apply(a, b, first)

    def keep(self, rows: Tensor) -> None:
        """See `BlockEngine.keep`."""
        both = torch.cat([rows, rows + self.n]) if self.guidance.active else rows
        self.n = len(rows)
        self.cache[:, :, : len(both)] = self.cache[:, :, both]  # within the memory that is there
        self.cache = self.cache[:, :, : len(both)]
        if self.embedding is not None:
            self.embedding = self.embedding[both]
        if self.inverse_temp is not None:
            self.inverse_temp = self.inverse_temp[both]
        self._bind()


def conditions(
    block: FlowBlock, labels: Tensor | None, n: int, guidance: Guidance
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to every token, and the inverse attention temperature, of every row, conditional rows first.

    Both halves are told the noise level at which the flow is inverted.
    """
    t = guidance.settings.noise_level
    noise = None if t is None else torch.full((n,), t, dtype=torch.float32, device=block.proj_in.weight.device)
    embedding = block.conditioning(labels, noise, n)
    if not guidance.active:
        return embedding, None
    if embedding is not None:
        no_label = block.conditioning(None, noise, n)
        assert no_label is not None
        embedding = torch.cat([embedding, no_label])
    if guidance.settings.attn_temp == 1.0:
        return embedding, None
    inverse_temp = torch.ones(2 * n, 1, 1, 1, dtype=block.proj_in.weight.dtype, device=block.proj_in.weight.device)
    inverse_temp[n:] = 1 / guidance.settings.attn_temp
    return embedding, inverse_temp
