"""Iterative denoising is its formulas: one step, and the whole way down for data whose score is known."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tarflow.models.denoise import denoise, denoise_in_steps, flow_score, schedule, step
from tarflow.models.flow import TarFlow
from tests.helpers.flows import config, perturbed

MEAN, STD, T1 = 0.2, 0.5, 0.7  # of the data, a Gaussian; the level that denoising begins at


def images(n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return MEAN + math.hypot(STD, T1) * torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64)


def score(x: Tensor, level: float) -> Tensor:
    """Of N(MEAN, STD^2) with noise of a level: N(MEAN, STD^2 + level^2)."""
    return -(x - MEAN) / (STD**2 + level**2)


def posterior_mean(x: Tensor, level: float) -> Tensor:
    return MEAN + (x - MEAN) * STD**2 / (STD**2 + level**2)


def test_one_step_gives_the_exact_posterior_mean() -> None:
    x = images()
    torch.testing.assert_close(
        denoise_in_steps(x, schedule(T1, 0.01, 1), score), posterior_mean(x, T1), rtol=0, atol=1e-14
    )


def test_a_step_is_its_formula() -> None:
    x, t, s = images(), 0.5, 0.3
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clean = posterior_mean(x, t)
    v = (x - clean) / t
    torch.testing.assert_close(step(x, clean, t, s), x - v * (t - s), rtol=0, atol=1e-14)
    alpha = (s / t) ** 2
    expected = clean + s * (math.sqrt(alpha) * v + math.sqrt(1 - alpha) * fresh)
    torch.testing.assert_close(step(x, clean, t, s, fresh), expected, rtol=0, atol=1e-14)
    assert torch.equal(step(x, clean, t, 0.0, fresh), clean)


@pytest.mark.parametrize("kind", ["linear", "geometric"])
def test_the_levels_go_from_the_first_to_the_last_and_to_nothing(kind: str) -> None:
    levels = schedule(0.7, 0.01, 70, kind)
    assert len(levels) == 71
    assert [levels[0], levels[-2], levels[-1]] == pytest.approx([0.7, 0.01, 0], abs=1e-12)
    gaps = [a - b if kind == "linear" else b / a for a, b in itertools.pairwise(levels[:-1])]
    assert gaps == pytest.approx([gaps[0]] * 69, rel=1e-9)
    assert schedule(0.7, 0.01, 1, kind) == [0.7, 0.0]


def test_the_ode_comes_to_the_exact_solution_as_steps_are_added() -> None:
    """For a Gaussian the ODE dx/dt = (x - x0) / t scales x - MEAN with the standard deviation of the noisy data."""
    x = images()
    exact = MEAN + (x - MEAN) * STD / math.hypot(STD, T1)
    wrong = [
        float((denoise_in_steps(x, schedule(T1, T1 / steps, steps), score) - exact).abs().max())
        for steps in (70, 140, 280)
    ]
    assert wrong[0] < 0.02
    assert [a / b for a, b in itertools.pairwise(wrong)] == pytest.approx(
        [2, 2], rel=0.1
    )  # Euler's method is of first order


def test_the_stochastic_form_is_the_recursion_of_its_coefficients() -> None:
    """Every step is linear in x and in its noise, so that the whole way down is a sum with known weights."""
    x, levels = images(), schedule(T1, 0.1, 5)
    draws = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    states: list[Tensor] = []
    found = denoise_in_steps(x, levels, score, lambda number: draws[number], states)
    expected = x - MEAN
    for (t, s), fresh in zip(itertools.pairwise(levels[:-1]), draws):
        expected = expected * (STD**2 + s**2) / (STD**2 + t**2) + s * math.sqrt(1 - (s / t) ** 2) * fresh
    torch.testing.assert_close(found, posterior_mean(MEAN + expected, levels[-2]), rtol=0, atol=1e-13)
    assert len(states) == 6
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], found)


def test_the_score_of_a_flow_is_that_of_its_density() -> None:
    """Zero output weights make a flow the identity times its input scale: a normal density, at every level."""
    model = TarFlow(config(noise_conditioning=True, input_scale=2.0, num_classes=0))
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    x = images().float()
    torch.testing.assert_close(flow_score(model, None)(x, 0.3), -4 * x, rtol=1e-5, atol=1e-5)
    expected = x * math.prod(1 - 4 * t * (t - s) for t, s in zip([0.3, 0.2, 0.1], [0.2, 0.1, 0.0]))
    found = denoise_in_steps(x, schedule(0.3, 0.1, 3), flow_score(model, None))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_flow_is_asked_at_the_level_of_each_step_and_an_image_does_not_depend_on_its_batch() -> None:
    model = perturbed(config(noise_conditioning=True), outputs=0.02)
    x, y = images().float(), torch.tensor([0, 1, -1, 3])
    levels = schedule(0.3, 0.05, 3)
    found = denoise_in_steps(x, levels, flow_score(model, y))
    alone = denoise_in_steps(x[2:3], levels, flow_score(model, y[2:3]))
    torch.testing.assert_close(alone, found[2:3], rtol=1e-5, atol=1e-5)
    stuck = denoise_in_steps(x, levels, lambda x, _: flow_score(model, y)(x, 0.3))
    assert (stuck - found).abs().max() > 1e-4
    assert torch.equal(denoise(model, x, y, 0.3, multiplier=0), x)
