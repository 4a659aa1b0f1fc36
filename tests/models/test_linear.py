"""The transformer's linear layer: one product, whichever way it is computed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tarflow.models.linear import MANY_ROWS, Linear, linear_by_convolution


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Linear]:
    torch.manual_seed(0)
    return torch.randn(*shape, 24, dtype=dtype).requires_grad_(), Linear(24, 40).to(dtype)


def operations(layer: Linear, x: Tensor) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        layer(x)
    return {event.key for event in record.key_averages()} & {"aten::conv2d", "aten::linear"}


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, MANY_ROWS), (1, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_the_same_product_forward_and_backward(shape: tuple[int, ...], bias: bool) -> None:
    x, layer = inputs(*shape)
    tensors = [x, layer.weight, layer.bias][: 3 if bias else 2]
    ours = linear_by_convolution(x, layer.weight, layer.bias if bias else None)
    theirs = F.linear(x, layer.weight, layer.bias if bias else None)
    weight = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, tensors, weight), torch.autograd.grad(theirs, tensors, weight)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3 if shape[-1] == MANY_ROWS else 1e-5)


def test_in_bfloat16_it_is_as_near_to_float32() -> None:
    x, layer = inputs(MANY_ROWS, dtype=torch.bfloat16)
    exact = F.linear(x.float(), layer.weight.float(), layer.bias.float())

    def error(y: Tensor) -> float:
        return float(((y.float() - exact).norm() / exact.norm()).detach())

    assert error(linear_by_convolution(x, layer.weight, layer.bias)) < 1.1 * error(
        F.linear(x, layer.weight, layer.bias)
    )


def test_only_long_products_go_that_way_with_gradients_or_without(monkeypatch: pytest.MonkeyPatch) -> None:
    x, layer = inputs(2, MANY_ROWS // 2)
    assert operations(layer, x) == {"aten::conv2d"}
    assert operations(layer, x[:, 1:]) == {"aten::linear"}  # too few rows
    with torch.no_grad():
        assert operations(layer, x) == {"aten::conv2d"}  # a layer is computed the same way the second time
    assert operations(layer.double(), x.double()) == {"aten::linear"}  # a type that oneDNN does not know
    layer.float()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert operations(layer, x) == {"aten::linear"}  # there torch would use another library


def test_nothing_is_kept_for_the_backward_pass_but_the_input() -> None:
    x, layer = inputs(MANY_ROWS)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {t.untyped_storage().data_ptr() for t in kept} == {t.untyped_storage().data_ptr() for t in (x, layer.weight)}


def test_compiled_code_is_left_to_the_compiler() -> None:
    x, layer = inputs(MANY_ROWS)
    graphs: list[str] = []
    compiled = torch.compile(layer, backend=lambda graph, _: graphs.append(graph.code) or graph.forward, fullgraph=True)
    torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))
    assert len(graphs) == 1
    assert "linear" in graphs[0]
    assert "conv2d" not in graphs[0]
