"""The block engine for CUDA: a step of one token is recorded as a graph and replayed, a single launch for each token.

Token by token a GPU waits for its host, which issues a dozen kernels a layer (docs/gpu.md). A graph repeats the same kernels on
the same addresses, so what moves from token to token lies on the device: the position, which every step counts up itself.
Attention reads the cache up to the end of a stretch of tokens, behind a mask, and each stretch has a graph of its own: one over
the whole sequence would read twice as much as there is to see.
"""

import functools
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from tarflow.models.sampling.engine import KERNELS, EagerBlock

STRETCH = 64  # tokens that share a graph


class GraphedBlock(EagerBlock):
    """`EagerBlock`, which inverts by replaying. On another device it takes the same steps one by one, which tests go by."""

    @sdpa_kernel(KERNELS, set_priority=True)
    def invert(self, x: Tensor) -> None:
        """See `BlockEngine.invert`. Raises RuntimeError, as torch does, where a step cannot be recorded."""
        self.cache.zero_()  # what is masked is still multiplied by its weight of 0
        self.fresh = False
        tokens = x.shape[1]
        position = torch.zeros(self.n, dtype=torch.int64, device=x.device)
        steps = list[Callable[[], None]]()
        try:
            for start in range(0, tokens - 1, STRETCH):
                seen = min(start + STRETCH, tokens)
                # Once as it is: libraries that begin at their first call do so before anything is recorded.
                self._step(x, position, seen)
                more = min(seen, tokens - 1) - start - 1
                if more:
                    steps.append(recorded(functools.partial(self._step, x, position, seen), x.device))
                for _ in range(more):
                    steps[-1]()
        finally:
            if x.is_cuda:
                torch.cuda.synchronize(x.device)  # before the graphs go, and what they compute with

    def _step(self, x: Tensor, position: Tensor, seen: int) -> None:
        """Token `position` [N] of each sample gives the next one, in place, among `seen` places of the cache; counts up."""
        a, b = self._tokens(x, position, 1, seen)
        at = (position + 1)[:, None, None].expand(-1, 1, x.shape[2])
        x.scatter_(1, at, x.gather(1, at) * torch.exp(a) + b)
        position += 1


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What repeats a step that has been taken before: on a GPU a graph of its kernels, elsewhere the step itself."""
    if device.type != "cuda":
        return step
    beside, pool = _kept(device)
    here, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        # Other threads, such as one that pins memory, may go on. Not by `torch.cuda.graph`, which first gives memory back.
        # The ID is what torch 2.11 takes, and later ones know under another type.
        graph.capture_begin(pool.id, capture_error_mode="thread_local")  # type: ignore[arg-type]
        try:
            step()
        except BaseException:
            with suppress(RuntimeError):  # that the recording is void, which would hide why
                graph.capture_end()
            raise
        graph.capture_end()
    here.wait_stream(beside)
    return graph.replay


@functools.cache
def _kept(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.MemPool]:
    """One stream and one pool of memory for all recordings, which can share them: graphs are replayed one after the other.

    Libraries keep memory for every stream that they have seen, and the allocator that of a pool which nobody uses any more.
    """
    return torch.cuda.Stream(device), torch.cuda.MemPool()
