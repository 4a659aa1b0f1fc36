"""Causal attention in blocks: the same as the flash kernel and as the formula, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.models import attention
from tarflow.models.attention import (
    OPERATOR,
    attention_in_blocks,
    causal_attention,
    keeps_probabilities,
    kept_numbers,
)


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(2, 3, tokens, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def gradients(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return list(torch.autograd.grad(output, tensors, weight, retain_graph=True))


# 512 keeps its probabilities, 640 and 1,000 compute them anew; 65 and 1,000 end in a shorter block.
@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 512, 640, 1000])
def test_blocks_equal_the_formula(tokens: int) -> None:
    assert keeps_probabilities(torch.float32, tokens) == (tokens <= 512)
    q, k, v = inputs(tokens)
    logits = (q @ k.transpose(2, 3) / 4).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
    expected = logits.softmax(-1) @ v
    output = attention_in_blocks(q, k, v)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(output, [q, k, v]), gradients(expected, [q, k, v])):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [200, 1500])
def test_blocks_in_bfloat16_are_as_near_to_float32_as_the_flash_kernel(tokens: int) -> None:
    tensors = inputs(tokens, torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in tensors]
    reference = F.scaled_dot_product_attention(*exact, is_causal=True)
    flash = F.scaled_dot_product_attention(*tensors, is_causal=True)
    output = causal_attention(*tensors)

    def errors(result: Tensor) -> list[float]:
        found = [result, *gradients(result, tensors)]
        wanted = [reference, *gradients(reference, exact)]
        return [float(((a.float() - b).norm() / b.norm()).detach()) for a, b in zip(found, wanted)]

    for ours, theirs in zip(errors(output), errors(flash)):
        assert ours < max(1.5 * theirs, 0.01)


def test_what_is_kept_is_bounded_and_nothing_is_without_gradients() -> None:
    q, k, v = inputs(512)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attention_in_blocks(q, k, v)
    assert sum(kept) == 3 * q.numel() + 6 * kept_numbers(512)
    assert kept_numbers(512) < 0.6 * 512**2
    with torch.no_grad():
        assert torch.equal(attention_in_blocks(q, k, v), attention_in_blocks(q.detach(), k.detach(), v.detach()))


def test_operator_is_registered_as_compilation_and_autograd_expect() -> None:
    q, k, v = (t.detach().flatten(0, 1).requires_grad_() for t in inputs(70))
    torch.library.opcheck(OPERATOR, (q, k, v, True))


def test_blocks_serve_bfloat16_on_the_cpu_and_nothing_else() -> None:
    low, full = inputs(70, torch.bfloat16), inputs(70)
    assert torch.equal(causal_attention(*low), attention_in_blocks(*low))
    assert torch.equal(causal_attention(*full), F.scaled_dot_product_attention(*full, is_causal=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_long_sequences_are_laid_side_by_side(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    tensors = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in inputs(70, dtype)]
    short = causal_attention(*tensors)
    monkeypatch.setattr(attention, "LONG", 70)
    seen: list[bool] = []
    name, place = ("attention_in_blocks", attention) if dtype == torch.bfloat16 else ("scaled_dot_product_attention", F)
    real = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *a, **k: seen.extend(t.is_contiguous() for t in a) or real(*a, **k))
    long = causal_attention(*tensors)
    assert seen == [True] * 3
    for ours, theirs in zip([long, *gradients(long, tensors)], [short, *gradients(short, tensors)]):
        torch.testing.assert_close(ours, theirs)
