"""Every form of guidance is its formula; a weight of 0 is no guidance; blocks are guided or not as asked."""

from typing import Any

import pytest
import torch

from tarflow.models.errors import ModelError
from tarflow.models.flow import TarFlow
from tarflow.models.sampling.guidance import Guidance, closed_form
from tarflow.models.sampling.sequential import sample
from tarflow.models.sampling.settings import SamplingSettings
from tests.helpers.flows import config, noise, perturbed

Y = torch.tensor([0, 1, 3])


@torch.no_grad()
def by_the_book(model: TarFlow, z: torch.Tensor, settings: SamplingSettings, guided: set[int]) -> torch.Tensor:
    """The guided inverse in float64, with two passes over what is known for each token, straight from the formulas."""
    model = model.double()
    x, w = z.double(), settings.guidance
    for number in reversed(range(3)):
        block: Any = model.blocks[number]
        z, x = block.order(x), block.order(x).clone()
        for i in range(1, 16):
            a, b = (part[:, i].double() for part in block.scale_and_shift(x, Y))
            if number in guided:
                a_u, b_u = (part[:, i].double() for part in block.scale_and_shift(x, None))
                weight = w * i / 15 if settings.annealed else w
                if settings.guidance_form == "linear":
                    a, b = a + weight * (a - a_u), b + weight * (b - b_u)
                elif settings.guidance_form == "sigma":
                    sigma = torch.exp(a) + weight * (torch.exp(a) - torch.exp(a_u))
                    a, b = torch.log(sigma.abs()), b + weight * (b - b_u)
                else:
                    var, var_u = torch.exp(2 * a), torch.exp(2 * a_u)
                    s = (var / var_u).clamp(max=1)
                    b = ((1 + weight) * b - weight * s * b_u) / (1 + weight - weight * s)
                    a = torch.log(torch.sqrt(var) / torch.sqrt(1 + weight - weight * s))
            x[:, i] = z[:, i] * torch.exp(a) + b
        x = block.order(x)
    return model.unpatchify(x)


@pytest.mark.parametrize("form", ["linear", "closed", "sigma"])
@pytest.mark.parametrize("annealed", [True, False])
@pytest.mark.parametrize("blocks", [(), (-1,), (0, 2)], ids=str)
@pytest.mark.case("S10")
def test_each_form_is_its_formula_in_the_blocks_that_are_named(
    form: str, annealed: bool, blocks: tuple[int, ...]
) -> None:
    settings = SamplingSettings(guidance=2.0, guidance_form=form, annealed=annealed, guide_blocks=blocks)
    ours = sample(perturbed(config()), noise(3), Y, settings)
    expected = by_the_book(perturbed(config()), noise(3), settings, {b % 3 for b in blocks} or {0, 1, 2})
    assert (ours - expected).abs().max() <= 2e-5
    unguided = sample(perturbed(config()), noise(3), Y)
    assert (ours - unguided).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["linear", "closed", "sigma"])
@pytest.mark.case("S10")
def test_weight_zero_is_unguided_to_the_bit(form: Any) -> None:
    model = perturbed(config())
    settings = SamplingSettings(guidance=0.0, guidance_form=form, guide_blocks=(0,))
    assert torch.equal(sample(model, noise(3), Y, settings), sample(model, noise(3), Y))


def test_the_closed_form_is_the_product_of_gaussians() -> None:
    """p_c^(1 + w) / p_u^w, by completing the square, where the unconditional Gaussian is the wider one."""
    a_c, a_u, b_c, b_u = (torch.tensor(v, dtype=torch.float64) for v in (-0.3, 0.2, 0.5, -0.4))
    w = 1.7
    precision = (1 + w) * torch.exp(-2 * a_c) - w * torch.exp(-2 * a_u)
    mean = ((1 + w) * b_c * torch.exp(-2 * a_c) - w * b_u * torch.exp(-2 * a_u)) / precision
    a, b = closed_form(a_c, a_u, b_c, b_u, w)
    torch.testing.assert_close(torch.exp(-2 * a), precision)
    torch.testing.assert_close(b, mean)


def test_the_closed_form_stays_bounded_where_the_linear_one_does_not() -> None:
    """With an unconditional half that is narrower the ratio is 1: the scale stays the conditional one's at any weight."""
    zero = torch.zeros(1, 1, 1)
    halves = torch.cat([zero, zero - 3]), torch.cat([zero, zero])
    for form, bound in (("closed", 0.0), ("linear", 300.0)):
        settings = SamplingSettings(guidance=100, annealed=False, guidance_form=form)
        a, _ = Guidance.of_block(settings, 0, 1, 2).apply(*halves, 0)
        assert float(a) == pytest.approx(bound)


def test_a_block_that_the_model_does_not_have_is_refused() -> None:
    settings = SamplingSettings(guidance=1.0, guide_blocks=(3,))
    with pytest.raises(ModelError, match=r"sampling.guide_blocks=\[3\] names block 3, and the model has 3 \(0..2"):
        sample(perturbed(config()), noise(3), Y, settings)
