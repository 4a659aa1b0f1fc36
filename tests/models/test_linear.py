"""The product of the CPU's float32 path equals torch's own, in value and gradients, for both orders of the weights' gradient."""

import pytest
import torch
from torch import nn

from models.linear import Linear


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("lead", [(5,), (2, 7), (3, 1)])
def test_equals_torchs_own(wide: bool, lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours = Linear(12, 40) if wide else Linear(40, 12)
    theirs = nn.Linear(ours.in_features, ours.out_features)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*lead, ours.in_features)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(a), theirs(b), rtol=1e-5, atol=1e-6)
    weight = torch.randn(*lead, ours.out_features)
    found = torch.autograd.grad((ours(a) * weight).sum(), [a, *ours.parameters()])
    wanted = torch.autograd.grad((theirs(b) * weight).sum(), [b, *theirs.parameters()])
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-5)


def test_other_types_go_torchs_way() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        layer, x = Linear(8, 4).to(dtype), torch.randn(3, 8, dtype=dtype)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(8, 4)(torch.randn(3, 8)).dtype == torch.bfloat16


def test_input_without_gradient_and_empty_batches() -> None:
    layer = Linear(8, 4)
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.weight.grad is not None
    assert layer(torch.randn(0, 8)).shape == (0, 4)
