"""All blocks iterated at once on each other's unfinished output: for small batches, where a device waits for its launches.

A pass computes (a, b) of every block at its tokens of the moment, as one batch over stacked weights, and then moves all of them
on: x = z exp(a) + b, where z of a block is what the block before it has just become. It ends where one block after the other
ends, in fewer passes and with more arithmetic.

A sample is done when all its blocks are certified at the same moment (see `paths`), so that its certificates are about what it
is. What is not done after half as many passes as all blocks have tokens, or is not finite, has not converged.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.models.flow import FlowBlock
from tarflow.models.sampling.engine import conditions
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.paths import LEAST_PASSES, STOP, Inverted, nothing_done, residual
from tarflow.models.transformer import causal_attention, rotated

Affine = tuple[Tensor, Tensor]  # weight and bias of every block


def joint(
    blocks: Sequence[FlowBlock], z: Tensor, labels: Tensor | None, guidances: Sequence[Guidance], tolerance: float
) -> list[Inverted]:
    """Invert blocks, given in the order of sampling; noise [N, T, D] in the first one's token order, labels [N] or None.

    One result for each, its x in the block's own order. A sample has converged in all blocks or in none.
    """
    turns = [one.reverse_order != other.reverse_order for one, other in pairwise(blocks)]
    done, rows = [nothing_done(z) for _ in blocks], torch.arange(len(z), device=z.device)
    stack = Stack(blocks, labels, len(z), guidances)
    nothing = torch.zeros_like(z[:, 1:]).expand(len(blocks), -1, -1, -1)
    x = _moved(z, nothing, nothing, turns)  # from the noise, in every block
    for number in range(1, len(blocks) * max(LEAST_PASSES, z.shape[1] // 2) + 1):
        a, b = stack.scales_and_shifts(x)
        inputs = torch.stack([z, *(_turned(some, turn) for some, turn in zip(x, turns))])
        found = residual(*(part.flatten(0, 1) for part in (x, inputs, a, b))).view(len(blocks), len(z))
        there = (found <= STOP * tolerance).all(0)
        leaving = there | ~torch.isfinite(x).flatten(2).all(2).all(0)
        for result, tokens, certificate in zip(done, x, found):
            result.passes[rows.cpu()] = number
            result.put(rows[leaving], tokens[leaving], certificate[leaving], there[leaving])
        if leaving.all():
            break
        if leaving.any():
            left = (~leaving).nonzero()[:, 0]
            stack.keep(left)
            rows, z, a, b = rows[left], z[left], a[:, left], b[:, left]
        x = _moved(z, a, b, turns)
    return list(done)


def _turned(x: Tensor, turn: bool) -> Tensor:
    return x.flip(1) if turn else x


def _moved(z: Tensor, a: Tensor, b: Tensor, turns: Sequence[bool]) -> Tensor:
    """The tokens [G, N, T, D] of all blocks by their (a, b) [G, N, T - 1, D], each from what the one before has become."""
    moved: list[Tensor] = []
    for scale, shift, turn in zip(a, b, [False, *turns]):
        z = _turned(z, turn)
        z = torch.cat([z[:, :1], z[:, 1:] * torch.exp(scale) + shift], 1)
        moved.append(z)
    return torch.stack(moved)


class Stack:
    """The networks of G blocks as one: every tensor has a leading axis of blocks."""

    def __init__(
        self, blocks: Sequence[FlowBlock], labels: Tensor | None, n: int, guidances: Sequence[Guidance]
    ) -> None:
        self.blocks, self.guidances, self.n = blocks, guidances, n
        self.halves = 2 if any(guidance.active for guidance in guidances) else 1
        self.embedding, self.inverse_temp = None, None
        embeddings = []
        for block, guidance in zip(blocks, guidances):
            embedding, inverse_temp = conditions(block, labels, n, guidance)
            if embedding is not None:  # a block that is not guided computes its half twice, and the first counts
                embeddings.append(embedding.repeat(self.halves * n // len(embedding), 1, 1))
            if inverse_temp is not None:
                self.inverse_temp = inverse_temp
        if embeddings:
            self.embedding = torch.stack(embeddings)
        tokens = blocks[0].config.num_tokens
        self.positions = torch.stack([block.position_embedding().expand(tokens, -1)[:-1] for block in blocks])
        tables = [table[:-1] for block in blocks if (table := block.rotary()) is not None]
        self.rotary = torch.stack(tables)[:, None, None] if tables else None  # [G, 1, 1, T - 1, K]
        self.proj_in = _linear(block.proj_in for block in blocks)
        self.proj_out = _linear(block.proj_out for block in blocks)
        deepest = max(len(block.attn_blocks) for block in blocks)
        self.layers = [_at_depth(blocks, depth, self.positions.device) for depth in range(deepest)]

    def scales_and_shifts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X [G, N, T, D], each block's in its own order -> guided (a, b) of all tokens but the first, [G, N, T - 1, D]."""
        h = _times(x[:, :, :-1], self.proj_in) + self.positions[:, None]
        if self.halves == 2:
            h = torch.cat([h, h], 1)
        if self.embedding is not None:
            h = h + self.embedding
        for members, layer in self.layers:
            some = self._layer(h[members], layer, None if self.rotary is None else self.rotary[members])
            h = some if len(some) == len(h) else h.index_copy(0, members, some)
        found = []
        for block, guidance, out in zip(self.blocks, self.guidances, _times(h, self.proj_out)):
            a, b = block.split(out if guidance.active else out[: self.n])
            found.append(torch.stack(guidance.apply(a, b, 0)))
        a, b = torch.stack(found, 1)
        return a, b

    def _layer(self, h: Tensor, layer: tuple[Any, ...], rotary: Tensor | None) -> Tensor:
        norm1, qkv, proj, norm2, up, down, *qk_norms = layer
        h = h + _times(self._attention(_times(_normed(h, norm1), qkv), qk_norms, rotary), proj)
        return h + _times(F.gelu(_times(_normed(h, norm2), up)), down)

    def _attention(self, qkv: Tensor, qk_norms: Sequence[Tensor], rotary: Tensor | None) -> Tensor:
        g, rows, t, c = qkv.shape
        heads = self.blocks[0].config.num_heads
        q, k, v = qkv.view(g, rows, t, 3 * heads, -1).transpose(2, 3).chunk(3, dim=2)
        if qk_norms:
            q, k = (F.layer_norm(x, x.shape[-1:]) * scale for x, scale in zip((q, k), qk_norms))
        if rotary is not None:
            q, k = rotated(q, rotary), rotated(k, rotary)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        if self.inverse_temp is not None:
            q = q * self.inverse_temp.repeat(g, 1, 1, 1)
        return causal_attention(q, k, v).transpose(1, 2).reshape(g, rows, t, c // 3)

    def keep(self, rows: Tensor) -> None:
        """Go on with these samples alone."""
        both = torch.cat([rows, rows + self.n]) if self.halves == 2 else rows
        self.n = len(rows)
        if self.embedding is not None:
            self.embedding = self.embedding[:, both]
        if self.inverse_temp is not None:
            self.inverse_temp = self.inverse_temp[both]


def _times(x: Tensor, linear: Affine) -> Tensor:
    """X [G, N, T, in] -> [G, N, T, out], each block by its own weights [G, in, out] and bias [G, 1, out]."""
    weight, bias = linear
    return torch.baddbmm(bias, x.flatten(1, 2), weight).view(*x.shape[:3], -1)


def _normed(x: Tensor, affine: Affine) -> Tensor:
    weight, bias = affine
    return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight)


def _at_depth(blocks: Sequence[FlowBlock], depth: int, device: torch.device) -> tuple[Any, tuple[Any, ...]]:
    """Which blocks have a layer at this depth, as an index into the axis of blocks, and those layers."""
    deep = [number for number, block in enumerate(blocks) if depth < len(block.attn_blocks)]
    members = slice(None) if len(deep) == len(blocks) else torch.tensor(deep, device=device)
    return members, _layer(blocks[number].attn_blocks[depth] for number in deep)


def _layer(layers: Iterable[Any]) -> tuple[Any, ...]:
    """One layer of every block: norm, qkv, projection, norm, the two of the MLP, and the norms of queries and keys if any."""
    layers = list(layers)
    attention, mlp = [layer.attention for layer in layers], [layer.mlp for layer in layers]
    return (
        _norm(part.norm for part in attention),
        _linear(part.qkv for part in attention),
        _linear(part.proj for part in attention),
        _norm(part.norm for part in mlp),
        _linear(part.main[0] for part in mlp),
        _linear(part.main[2] for part in mlp),
        *(
            _scales(getattr(part, name) for part in attention)
            for name in ("q_norm", "k_norm")
            if layers[0].attention.q_norm
        ),
    )


def _scales(parts: Iterable[Any]) -> Tensor:
    """The scales [G, 1, 1, 1, K] of a norm of queries or keys."""
    return torch.stack([part.weight for part in parts])[:, None, None, None]


def _linear(parts: Iterable[Any]) -> Affine:
    weights, biases = zip(*((part.weight.t(), part.bias) for part in parts))
    return torch.stack(weights), torch.stack(biases)[:, None]


def _norm(parts: Iterable[Any]) -> Affine:
    weights, biases = zip(*((part.weight, part.bias) for part in parts))
    return torch.stack(weights)[:, None, None], torch.stack(biases)[:, None, None]
