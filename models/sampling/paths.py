"""The ways of inverting one block, each through `BlockEngine.tokens`: one by one, a sliding window, the whole sequence.

The inverse is the fixed point of x_j = z_j exp(a_j) + b_j, where (a_j, b_j) depend on the tokens before j alone. One pass over
any number of tokens computes all their (a, b) at once; token j is final when all tokens before it are. So every way ends at
the same x, after one pass a token at most.

The certificate of a sample is r = max |(x - b) exp(-a) - z|, with the guided (a, b) at its own x: x is the exact inverse of
noise that differs from the one asked for by r at most in any number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow.models.sampling.engine import BlockEngine

STOP = 0.25  # of the tolerance: where an iteration ends. Errors of several blocks add up
FREEZE = 1 / 30  # of the tolerance: what a token may still have moved by when a window leaves it behind
LEAST_PASSES = 16


@dataclass(frozen=True)
class Path:
    """How a block is inverted: "sequential", "window" (of `width` tokens), "whole", or "joint" with all other blocks."""

    kind: str
    width: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.width}" if self.width else self.kind


SEQUENTIAL, WHOLE, JOINT = Path("sequential"), Path("whole"), Path("joint")


@dataclass
class Inverted:
    """A block inverted for N samples. NaN in `certificate` where none was computed."""

    x: Tensor  # [N, T, D]
    certificate: Tensor  # [N] float64, in units of the noise
    passes: Tensor  # [N] int64: calls of the engine that the sample took part in
    converged: Tensor  # [N] bool


def one_by_one(engine: BlockEngine, z: Tensor) -> Inverted:
    """Sequential: T - 1 passes of one token."""
    x = z.clone()
    engine.invert(x)
    n, tokens, _ = z.shape
    unknown = torch.full((n,), torch.nan, dtype=torch.float64)
    return Inverted(x, unknown, torch.full((n,), tokens - 1), torch.ones(n, dtype=torch.bool))


def residual(x: Tensor, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The certificate [N] of x [N, T, D], with (a, b) [N, T - 1, D] at x; NaN where anything is not finite."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's devices have no more
    x, z, a, b = x.to(wide), z.to(wide), a.to(wide), b.to(wide)
    off = (x[:, 1:] - b) * torch.exp(-a) - z[:, 1:]
    first = (x[:, :1] - z[:, :1]).abs().flatten(1).amax(1)  # the identity
    found = torch.maximum(off.abs().flatten(1).amax(1), first) if off.shape[1] else first
    return torch.where(torch.isfinite(found), found, torch.nan)


def finite(x: Tensor) -> Tensor:
    """Bool [N]: whose numbers are all finite; by the largest, which takes a sixth of the time of looking at each."""
    return torch.isfinite(x.flatten(1).abs().amax(1))


def certify(engine: BlockEngine, x: Tensor, z: Tensor) -> Tensor:
    """The certificate [N] float64 of finished samples, by one pass over all their tokens."""
    a = b = x[:, 1:]  # of a single token nothing is computed
    if x.shape[1] > 1:
        a, b = engine.tokens(x, 0, x.shape[1] - 1)
    return residual(x, z, a, b).cpu()


def whole(engine: BlockEngine, z: Tensor, tolerance: float) -> Inverted:
    """Iterate on whole sequences until each sample's certificate is below STOP of the tolerance.

    A sample that is there leaves the batch; one that is not finite, or not there after half as many passes as tokens, leaves
    it as not converged. The certificate comes with the last pass, at no cost.
    """
    n, tokens, _ = z.shape
    done = nothing_done(z)
    x, rows = z.clone(), torch.arange(n, device=z.device)
    for number in range(1, max(LEAST_PASSES, tokens // 2) + 1):
        a, b = engine.tokens(x, 0, tokens - 1)
        found = residual(x, z, a, b)
        there = found <= STOP * tolerance
        leaving = there | ~finite(x)
        if leaving.any():
            done.put(rows[leaving], x[leaving], found[leaving], there[leaving])
        done.passes[rows.cpu()] = number
        if leaving.all():
            return done
        if leaving.any():
            left = (~leaving).nonzero()[:, 0]
            engine.keep(left)
            rows, x, z, a, b = (part[left] for part in (rows, x, z, a, b))
        x[:, 1:] = z[:, 1:] * torch.exp(a) + b
    return done


def window(engine: BlockEngine, z: Tensor, tolerance: float, width: int) -> Inverted:
    """Iterate on `width` tokens, which slide on as far as the first of them stand still, each sample at its own rate.

    A token is left behind when it moved by less than FREEZE of the tolerance and all before it are. A pass settles one token
    at least. Has no certificate of its own.
    """
    n, tokens, d = z.shape
    count = min(width, tokens - 1)
    done, rows = nothing_done(z), torch.arange(n, device=z.device)
    x, settled = z.clone(), torch.zeros(n, dtype=torch.int64, device=z.device)  # the last token that is final
    ahead = torch.arange(1, count + 1, device=z.device)
    number = 0
    while len(rows):
        number += 1
        first = settled.clamp(max=tokens - 1 - count)
        a, b = engine.tokens(x, first, count)
        index = first[:, None] + ahead
        at = index[:, :, None].expand(-1, -1, d)
        old = x.gather(1, at)
        behind = index <= settled[:, None]
        new = torch.where(behind[:, :, None], old, z.gather(1, at) * torch.exp(a) + b)
        x = x.scatter(1, at, new)
        still = behind | ((new - old).abs().amax(2) <= FREEZE * tolerance)
        # The token after those that stand still was computed from final ones alone.
        settled = first + (still.long().cumprod(1).sum(1) + 1).clamp(max=count)
        leaving = (settled >= tokens - 1) | ~finite(x)
        if leaving.any():
            good = finite(x[leaving])
            unknown = torch.full((int(leaving.sum()),), torch.nan, dtype=torch.float64)
            done.put(rows[leaving], x[leaving], unknown, good)
            done.passes[rows[leaving].cpu()] = number
            left = (~leaving).nonzero()[:, 0]
            engine.keep(left)
            rows, x, z, settled = (part[left] for part in (rows, x, z, settled))
    return done


class Done(Inverted):
    """What is being found: samples are put in as they finish."""

    def put(self, rows: Tensor, x: Tensor, certificate: Tensor, converged: Tensor) -> None:
        """The samples of these rows are finished."""
        self.x[rows] = x
        self.certificate[rows.cpu()] = certificate.cpu()
        self.converged[rows.cpu()] = converged.cpu()


def nothing_done(z: Tensor) -> Done:
    """What was found of the N samples z [N, T, D] before any is finished."""
    n = len(z)
    unknown = torch.full((n,), torch.nan, dtype=torch.float64)
    return Done(z.clone(), unknown, torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.bool))


def follow(path: Path, engine: BlockEngine, z: Tensor, tolerance: float) -> Inverted:
    """Invert a block by a path; z [N, T, D] in the block's order."""
    if path.kind == "whole" and z.shape[1] > 1:
        return whole(engine, z, tolerance)
    if path.kind == "window" and z.shape[1] > 1:
        return window(engine, z, tolerance, path.width)
    return one_by_one(engine, z)
