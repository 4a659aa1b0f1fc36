"""Causal attention: torch's flash kernel, or in bfloat16 on the CPU blocks of queries against the keys they may see.

The CPU's flash kernel makes poor use of its bfloat16 products. Plain batched products over blocks of queries do better
(`benchmarks/train_step.py`): a block sees only the keys up to its own end, so the masked half is not computed, and no T x T
mask is stored. For the backward pass the probabilities are kept while a row of them is short, and computed anew otherwise,
so what a layer keeps stays linear in T.

An operator of its own (`tarflow::causal_attention`), so that compilation sees one node, and selective activation
checkpointing can keep its output.

Shapes: N = batch x heads, T tokens, K channels of a head.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LONG = 2048  # tokens from which it pays on the CPU to lay the rows of a head side by side first
KEPT_ROW_BYTES = 2048  # up to here the kept probabilities take less than what else a layer keeps for a token


def causal_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v with token t seeing tokens 0..t; [B, H, T, K] as the inputs."""
    on_cpu = q_BHTK.device.type == "cpu"
    if on_cpu and q_BHTK.shape[2] >= LONG:
        q_BHTK, k_BHTK, v_BHTK = (t.contiguous() for t in (q_BHTK, k_BHTK, v_BHTK))
    if not on_cpu or q_BHTK.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
    return attention_in_blocks(q_BHTK, k_BHTK, v_BHTK)


def attention_in_blocks(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """The same by blocks of queries, in any float dtype."""
    B, H, T, K = q_BHTK.shape
    q, k, v = (t.reshape(B * H, T, K) for t in (q_BHTK, k_BHTK, v_BHTK))
    keep = torch.is_grad_enabled() and keeps_probabilities(q.dtype, T)
    return _attend(q, k, v, keep)[0].view(B, H, T, K)


def keeps_probabilities(dtype: torch.dtype, tokens: int) -> bool:
    """Whether the backward pass of blocks finds the probabilities or computes them anew."""
    return tokens * dtype.itemsize <= KEPT_ROW_BYTES


def kept_numbers(tokens: int) -> int:
    """Probabilities that blocks hold for one head: all pairs of a query and a key that its block sees."""
    return sum((end - start) * end for start, end in _blocks(tokens))


def _blocks(tokens: int) -> Iterator[tuple[int, int]]:
    """[start, end) of the queries of each block: an eighth of the sequence, within 64 and 256."""
    size = min(max(tokens // 8, 64), 256)
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)


def _probabilities(q: Tensor, k: Tensor, start: int, end: int, out: Tensor) -> Tensor:
    """Softmax over the keys 0..t of each query t of the block, in `out` [N, end - start, end]."""
    torch.baddbmm(out, q[:, start:end], k[:, :end].transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5, out=out)
    size = end - start
    # Only in the block's own square some keys lie ahead of their query.
    out[:, :, start:] += torch.full((size, size), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    return torch.softmax(out, -1, out=out)


@torch.library.custom_op("tarflow::causal_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """(output [N, T, K], kept probabilities, one block after the other: [N * kept_numbers(T)], or empty)."""
    n, tokens, _ = q.shape
    kept = q.new_empty(n * kept_numbers(tokens) if keep else 0)
    spare = None if keep else q.new_empty(n * _largest(tokens))
    output, done = torch.empty_like(q), 0
    for start, end in _blocks(tokens):
        size = n * (end - start) * end
        room = kept[done : done + size] if spare is None else spare[:size]
        p = _probabilities(q, k, start, end, room.view(n, end - start, end))
        torch.bmm(p, v[:, :end], out=output[:, start:end])
        done += size
    return output, kept


@torch.library.custom_op("tarflow::causal_attention_backward", mutates_args=())
def _attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Those of k and v add up over blocks in float32."""
    n, tokens, channels = q.shape
    scale = channels**-0.5
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    spare, work, done = q.new_empty(0 if len(kept) else n * _largest(tokens)), q.new_empty(n * _largest(tokens)), 0
    for start, end in _blocks(tokens):
        shape, size = (n, end - start, end), n * (end - start) * end
        room = (kept[done : done + size] if len(kept) else spare[:size]).view(shape)
        p = room if len(kept) else _probabilities(q, k, start, end, room)
        done += size
        g = grad[:, start:end]
        grad_v[:, :end] += torch.bmm(p.transpose(1, 2), g)
        grad_p = torch.bmm(g, v[:, :end].transpose(1, 2), out=work[:size].view(shape))
        grad_logits = torch._softmax_backward_data(grad_p, p, -1, p.dtype, grad_input=grad_p)
        torch.bmm(grad_logits, k[:, :end], out=grad_q[:, start:end]).mul_(scale)
        grad_k[:, :end] += torch.bmm(grad_logits.transpose(1, 2), q[:, start:end])
    return grad_q, grad_k.mul_(scale).to(k.dtype), grad_v.to(v.dtype)


def _largest(tokens: int) -> int:
    return max((end - start) * end for start, end in _blocks(tokens))


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[0] * kept_numbers(q.shape[1]) if keep else 0)


@_attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _ = inputs
    ctx.save_for_backward(q, k, v, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, kept = ctx.saved_tensors
    return (*_attend_backward(grad.contiguous(), q, k, v, kept), None)


torch.library.register_autograd("tarflow::causal_attention", _backward, setup_context=_setup)
OPERATOR = torch.ops.tarflow.causal_attention.default
