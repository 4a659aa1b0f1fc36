"""Causal attention by torch's kernel and by the formula written out: the same, forward and backward; and with a cache."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tarflow.models.sampling.cached_layer import CachedLayer
from tarflow.models.transformer import SHORT, TransformerLayer, causal_attention


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v [2, 3, tokens, 16], cut out of one tensor as a layer does."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(2, tokens, 9, 16, generator=generator).to(dtype).requires_grad_()
    return list(qkv.transpose(1, 2).chunk(3, dim=1))


def gradients(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return list(torch.autograd.grad(output, tensors, weight, retain_graph=True))


class Operations(TorchDispatchMode):
    """Names of the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("tokens", "dtype", "written_out"),
    [
        (1, torch.bfloat16, True),
        (SHORT, torch.bfloat16, True),
        (SHORT + 1, torch.bfloat16, False),
        (SHORT, torch.float32, False),
        (SHORT, torch.float16, False),
    ],
)
def test_the_formula_serves_short_bfloat16_sequences_on_the_cpu(
    tokens: int, dtype: torch.dtype, written_out: bool
) -> None:
    with Operations() as seen:
        causal_attention(*inputs(tokens, dtype))
    assert ("baddbmm" in seen.names) == written_out
    assert ("_scaled_dot_product_flash_attention_for_cpu" in seen.names) != written_out


def test_an_accelerator_always_takes_torchs_own_attention() -> None:
    tensors = [t.detach().to("meta") for t in inputs(16, torch.bfloat16)]  # any device but the CPU
    with Operations() as seen:
        causal_attention(*tensors)
    assert "baddbmm" not in seen.names


@pytest.mark.parametrize("tokens", [1, 2, 16, 200, SHORT])
def test_the_formula_is_as_near_to_float32_as_the_flash_kernel_forward_and_backward(tokens: int) -> None:
    tensors = inputs(tokens, torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in tensors]
    logits = exact[0] @ exact[1].transpose(2, 3) / 4
    reference = logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf")).softmax(-1) @ exact[2]
    flash = F.scaled_dot_product_attention(tensors[0], tensors[1], tensors[2], is_causal=True)
    output = causal_attention(*tensors)
    assert output.dtype == torch.bfloat16

    def errors(result: Tensor) -> list[float]:
        found, wanted = [result, *gradients(result, tensors)], [reference, *gradients(reference, exact)]
        return [float(((a.float() - b).norm() / (b.norm() + 1e-6)).detach()) for a, b in zip(found, wanted)]

    for ours, theirs in zip(errors(output), errors(flash)):
        assert ours < max(1.5 * theirs, 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_sees_itself_and_those_before_it(dtype: torch.dtype) -> None:
    q, k, v = (t.detach() for t in inputs(32, dtype))
    before = causal_attention(q, k, v)
    for changed in ((q, k.index_fill(2, torch.arange(9, 32), 7), v), (q, k, v.index_fill(2, torch.arange(9, 32), 7))):
        after = causal_attention(*changed)
        assert torch.equal(after[:, :, :9], before[:, :, :9])
        assert not torch.isclose(after[:, :, 9:], before[:, :, 9:]).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_one_graph_and_the_same(dtype: torch.dtype) -> None:
    tensors = inputs(20, dtype)
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)(*tensors)
    eager = causal_attention(*tensors)
    for ours, theirs in zip([compiled, *gradients(compiled, tensors)], [eager, *gradients(eager, tensors)]):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tokens", [16, SHORT + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_by_token_with_a_cache_is_the_same(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    exact = TransformerLayer(channels=32, head_channels=16, expansion=4)
    layer = copy.deepcopy(exact).to(dtype)
    x = torch.randn(2, tokens, 32).to(dtype)
    cache = torch.full(
        (2, 2, 2, tokens, 16), torch.nan, dtype=dtype
    )  # keys and values, [2, B, H, T, K]: read once written
    with torch.no_grad():
        cached = CachedLayer(layer, cache, None)
        steps = torch.stack([cached.step(x[:, t].clone(), t, 1) for t in range(tokens)], dim=1)
        whole, reference = layer(x), exact(x.float())
    if dtype == torch.float32:
        torch.testing.assert_close(steps, whole, rtol=1e-5, atol=1e-5)
    for result in (steps, whole):
        assert (result.float() - reference).norm() < (1e-6 if dtype == torch.float32 else 0.01) * reference.norm()


def test_layers_are_torchs_own_under_the_published_names() -> None:
    layer = TransformerLayer(channels=32, head_channels=16, expansion=4)
    linear = {name for name, module in layer.named_modules() if type(module) is torch.nn.Linear}
    assert linear == {"attention.qkv", "attention.proj", "mlp.main.0", "mlp.main.2"}
