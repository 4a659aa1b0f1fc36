"""When a sweep's best setting is clearly the best."""

import numpy as np
import pytest
import torch

from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics, FrechetInfluence
from tarflow.evaluation.sweep.choice import Point, difference_stderr, why_unclear, with_error

NOISE = np.random.default_rng(0).normal(0, 1, 100)


def point(guidance, distance, influence=NOISE, denoise=1.0, attn_temp=1.0, count=100):
    values = None if influence is None else list(influence)
    return Point(guidance, denoise, attn_temp, distance, 0, count, values or ())


@pytest.mark.case("N11")
def test_a_clear_best_in_the_middle_of_the_range_is_clear():
    tried = [point(0, 9.0), point(1, 5.0), point(2, 9.0, influence=NOISE + 0.01)]
    assert why_unclear(tried, tried[1:]) == []


@pytest.mark.parametrize(("errors", "clear"), [(0.1, False), (1.9, False), (2.1, True)])
@pytest.mark.case("N11")
def test_two_standard_errors_of_the_difference_decide(errors, clear):
    """Independent samples of spread 1 and 2: sqrt(5 / 100) = 0.224 is one standard error, if they are as drawn."""
    other = 2 * np.random.default_rng(1).normal(0, 1, 100)
    error = np.std(NOISE - other, ddof=1) / 10
    assert error == pytest.approx(0.224, rel=0.2)
    runner_up = point(1.5, 337.17 + errors * error, influence=other)
    tried = [point(0, 999.0), point(1, 337.17), runner_up, point(2, 999.0)]
    assert difference_stderr(tried[1], runner_up) == pytest.approx(error, rel=1e-5)
    reasons = why_unclear(tried, tried[1:3])
    assert (reasons == []) == clear
    if not clear:
        assert f"a difference of {errors * error:.2f} ± {error:.2f}" in reasons[0]
        assert "guidance 1.5, denoise 1, attention temperature 1 is as good within the noise: 337." in reasons[0]


@pytest.mark.case("N11")
def test_samples_of_the_same_noise_are_compared_in_pairs():
    """Each distance alone is uncertain by 0.1; what moves both alike tells nothing about which is better."""
    one, other = point(1, 5.0), point(2, 5.05, influence=NOISE + 0.01 * np.cos(np.arange(100)))
    assert one.stderr == pytest.approx(np.std(NOISE, ddof=1) / 10, rel=1e-5)
    error = difference_stderr(one, other)
    assert error is not None
    assert error < 0.001
    assert why_unclear([point(0, 9.0), one, other], [one, other]) == []


@pytest.mark.case("N11")
def test_samples_that_either_lost_are_left_out_of_both():
    lost = [None, *NOISE[1:]]
    assert difference_stderr(point(1, 5.0), point(2, 5.1, influence=lost)) == 0.0
    assert point(2, 5.1, influence=lost).stderr == pytest.approx(np.std(NOISE[1:], ddof=1) / 10, rel=1e-5)


@pytest.mark.case("N11")
def test_without_errors_nothing_is_clear_and_a_setting_without_a_distance_does_not_compete():
    tried = [point(0, 9.0), point(1, 5.0, influence=None), point(2, 7.0, influence=None)]
    (reason,) = why_unclear(tried, tried[1:])
    assert "7.00, a difference of 2.00;" in reason
    tried = [point(0, 9.0), point(1, 5.0), point(2, None, influence=None)]
    assert why_unclear(tried, tried[1:]) == []


@pytest.mark.parametrize(
    ("best", "said"),
    [
        (point(3, 1.0), "guidance 3 is the largest that was tried: larger ones may be better still (--guidance)"),
        (point(0.5, 1.0), "guidance 0.5 is the smallest that was tried: smaller ones may be better still (--guidance)"),
        (point(1, 1.0, denoise=2.0), "denoise 2 is the largest that was tried: larger ones may be better still (--denoise)"),
        (point(1, 1.0, attn_temp=0.3), "attn_temp 0.3 is the smallest that was tried: smaller ones may be better still "
         "(--attn-temp)"),
    ],
)  # fmt: skip
@pytest.mark.case("N11")
def test_the_end_of_a_range_is_named(best, said):
    others = [
        point(w, 9.0, denoise=m, attn_temp=t) for w in (0.5, 1, 3) for m in (0.0, 1.0, 2.0) for t in (0.3, 1.0, 1.5)
    ]
    (reason,) = why_unclear(others, [best])
    assert reason == said


@pytest.mark.case("N11")
def test_zero_and_one_of_two_are_no_ends():
    """Less than no guidance there is not, and two values are alternatives, not a range."""
    others = [point(w, 9.0, denoise=m) for w in (0, 1, 3) for m in (0.5, 1.0)]
    assert why_unclear(others, [point(0, 1.0, denoise=0.5)]) == []


@pytest.mark.case("N11")
def test_the_error_is_that_of_an_evaluation():
    rows = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    sides = FeatureStatistics(4), FeatureStatistics(4)
    sides[0].add(rows)
    sides[1].add(1.2 * rows.flip(0) + 0.3)
    influence = FrechetInfluence(*sides)
    one = point(1, 1.0, influence=influence.of_rows(rows).tolist(), count=500)
    assert one.stderr == pytest.approx(influence.stderr(rows), rel=1e-5)
    assert with_error(337.171, one.stderr) == f"337.17 ± {one.stderr:.2f}"
    assert with_error(337.171, None) == "337.17"
