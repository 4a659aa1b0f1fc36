"""Every form of guidance, in one place: which blocks, which tokens, which formula.

With (a_c, b_c) of the conditional network, (a_u, b_u) of the unconditional one and the weight w, a token x = z exp(a) + b has

    linear   a = a_c + w (a_c - a_u),  b = b_c + w (b_c - b_u)                       (arXiv 2412.06329, section 2.6)
    closed   s = min(exp(2 (a_c - a_u)), 1),  v = 1 + w (1 - s)                       (the latent follow-up, STARFlow)
             a = a_c - log(v) / 2,  b = ((1 + w) b_c - w s b_u) / v
    sigma    exp(a) = |exp(a_c) + w (exp(a_c) - exp(a_u))|,  b as in the linear form                  (arXiv 2604.20041)

The closed form is the Gaussian p_c^(1 + w) / p_u^w, with the ratio s of the variances bounded by 1 so that it always is one.
The scale of the form `sigma` turns negative where the unconditional one is far larger; z is as likely as -z, so that its
absolute value stands for the same distribution.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tarflow.models.errors import ModelError
from tarflow.models.sampling.settings import SamplingSettings


@dataclass(frozen=True)
class Guidance:
    """How one block is guided: not at all where `weights` is None."""

    settings: SamplingSettings
    weights: Tensor | None  # [T - 1] float64 on the CPU: the weight of token 1, 2, ...

    @classmethod
    def of_block(cls, settings: SamplingSettings, block: int, blocks: int, tokens: int) -> "Guidance":
        """The guidance of block number `block`, counted as in the flow's forward direction.

        Raises ModelError for a setting `guide_blocks` that names a block the model does not have.
        """
        if problem := settings.blocks_problem(blocks):
            raise ModelError(problem)
        chosen = {number % blocks for number in settings.guide_blocks} or {block}
        if not settings.guided or block not in chosen:
            return cls(settings, None)
        # Annealed, the weight of token j is w * j / (T - 1): none for the first token, all of it for the last.
        weights = torch.full((tokens - 1,), settings.guidance, dtype=torch.float64)
        if settings.annealed:
            weights = weights * torch.arange(1, tokens, dtype=torch.float64) / (tokens - 1)
        return cls(settings, weights)

    @property
    def active(self) -> bool:
        """Whether an unconditional half is computed."""
        return self.weights is not None

    def apply(self, a: Tensor, b: Tensor, first: int | Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of rows [conditional, unconditional], each [2N, n, D] -> guided (a, b), each [N, n, D].

        The n tokens are those after token `first`, an int or int64 [N].
        """
        if self.weights is None:
            return a, b
        (a_c, a_u), (b_c, b_u) = a.chunk(2), b.chunk(2)
        weight = self._weight(a_c, first)
        if self.settings.guidance_form == "closed":
            guided_a, guided_b = closed_form(a_c, a_u, b_c, b_u, weight)
        elif self.settings.guidance_form == "sigma":
            guided_a, guided_b = linear_in_scale(a_c, a_u, weight), torch.lerp(b_u, b_c, 1 + weight)
        else:
            # a_c + w (a_c - a_u) in one call, as beyond the end of the line from a_u to a_c
            guided_a, guided_b = torch.lerp(a_u, a_c, 1 + weight), torch.lerp(b_u, b_c, 1 + weight)
        guide = self.settings.guide
        return (guided_a if "a" in guide else a_c), (guided_b if "b" in guide else b_c)

    @cached_property
    def _numbers(self) -> list[float]:
        """The weights, for calls of one token."""
        assert self.weights is not None
        return list(self.weights.tolist())

    def _weight(self, like: Tensor, first: int | Tensor) -> Tensor | float:
        assert self.weights is not None
        n = like.shape[1]
        if isinstance(first, int):
            if n == 1:
                return self._numbers[first]
            return self.weights[first : first + n].to(like)[:, None]
        index = first[:, None] + torch.arange(n, device=first.device)
        return self._table(like)[index][:, :, None]

    def _table(self, like: Tensor) -> Tensor:
        """The weights beside `like`, copied there once."""
        assert self.weights is not None
        if (found := self._tables.get((like.device, like.dtype))) is None:
            found = self._tables[like.device, like.dtype] = self.weights.to(like)
        return found

    @cached_property
    def _tables(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}


def linear_in_scale(a_c: Tensor, a_u: Tensor, weight: Tensor | float) -> Tensor:
    """The guided a of the form `sigma`: a_c + log |1 - w (exp(a_u - a_c) - 1)|."""
    return a_c + torch.log((1 - weight * torch.expm1(a_u - a_c)).abs())


def closed_form(a_c: Tensor, a_u: Tensor, b_c: Tensor, b_u: Tensor, weight: Tensor | float) -> tuple[Tensor, Tensor]:
    """The guided Gaussian's (a, b); see the head of this file."""
    excess = -torch.expm1((2 * (a_c - a_u)).clamp(max=0))  # 1 - s, without cancellation
    ratio = 1 + weight * excess
    return a_c - 0.5 * torch.log(ratio), ((1 + weight) * b_c - weight * (1 - excess) * b_u) / ratio
