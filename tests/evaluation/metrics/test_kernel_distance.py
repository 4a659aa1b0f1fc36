"""Kernel distance and Inception score: brute force, closed forms, another implementation."""

import math

import numpy as np
import pytest
import torch

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics import kernel_distance as kernel
from tarflow.evaluation.metrics.inception_score import InceptionScore
from tarflow.evaluation.metrics.kernel_distance import kernel_distance


def clouds(n: int, m: int, d: int = 6, shift: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=rng), torch.randn(m, d, generator=rng) + shift


def stderr(result):
    assert result.stderr is not None
    return result.stderr


def by_hand(x, y):
    """The unbiased estimate, pair by pair."""

    def value(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    def within(rows):
        return sum(value(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j)

    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    across = sum(value(a, b) for a in x for b in y)
    return within(x) / (n * (n - 1)) + within(y) / (m * (m - 1)) - 2 * across / (n * m)


def test_one_block_equals_the_sum_over_pairs():
    x, y = clouds(3, 3, shift=0.4)
    found = kernel_distance(x, y)  # three images make one block
    assert found.blocks == 1
    assert found.distance == pytest.approx(by_hand(x, y), rel=1e-12)
    assert found.stderr is None


def test_agrees_with_torch_fidelity_on_the_same_features():
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = (rows.double() for rows in clouds(600, 600, shift=0.3, seed=4))
    theirs = kid_features_to_metric(x, y, kid_subsets=200, kid_subset_size=60, verbose=False)
    ours = kernel_distance(x, y, block=60)
    # Theirs draws overlapping subsets, ours disjoint ones: two estimates of one number.
    error = theirs["kernel_inception_distance_std"] / 10**0.5
    assert ours.distance == pytest.approx(theirs["kernel_inception_distance_mean"], abs=3 * error)
    whole = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=600, verbose=False)
    wanted = whole["kernel_inception_distance_mean"]
    assert ours.distance == pytest.approx(wanted, rel=1e-9)


@pytest.mark.case("I05")
def test_the_estimate_is_the_unbiased_one_over_all_pairs():
    """It was a mean over blocks: 2.13 +- 1.14 for 200 images where all pairs give 1.39."""
    for n, m, shift in ((4, 4, 0.0), (23, 37, 0.4), (70, 50, 0.1)):  # blocks of unequal sizes, too
        x, y = clouds(n, m, shift=shift)
        for block in (3, 1000):
            assert kernel_distance(x, y, block).distance == pytest.approx(by_hand(x, y), rel=1e-9, abs=1e-12)


@pytest.mark.case("I05")
def test_tiles_do_not_change_it(monkeypatch):
    x, y = clouds(90, 70, shift=0.2)
    whole = kernel_distance(x, y, 5)
    monkeypatch.setattr(kernel, "TILE", 3)
    tiled = kernel_distance(x, y, 5)
    assert tiled.distance == pytest.approx(whole.distance, rel=1e-12)
    assert (tiled.blocks, tiled.stderr) == (14, pytest.approx(whole.stderr, rel=1e-9))


@pytest.mark.case("I05")
def test_agrees_with_torchmetrics_where_its_subset_is_everything():
    from torchmetrics.image.kid import poly_mmd

    x, y = clouds(120, 120, shift=0.2, seed=5)
    theirs = poly_mmd(x.double(), y.double(), degree=3, gamma=None, coef=1.0)
    assert kernel_distance(x, y).distance == pytest.approx(float(theirs), rel=1e-9)


@pytest.mark.case("I05")
def test_few_images_scatter_as_the_error_says_also_of_equal_clouds():
    for shift in (0.0, 0.5):
        found = [kernel_distance(*clouds(60, 60, shift=shift, seed=seed)) for seed in range(80)]
        spread = np.std([result.distance for result in found], ddof=1)
        error = np.mean([stderr(result) for result in found])
        assert 0.8 * spread < error < 1.7 * spread  # where clouds are equal, a jackknife errs on the large side


def test_the_standard_error_is_the_spread_over_independent_draws():
    found = [kernel_distance(*clouds(400, 500, shift=0.2, seed=seed), block=40) for seed in range(60)]
    assert {result.blocks for result in found} == {10}
    spread = np.std([result.distance for result in found], ddof=1)
    assert np.mean([stderr(result) for result in found]) == pytest.approx(spread, rel=0.25)


def test_equal_clouds_are_at_zero_within_the_error_and_a_shift_is_seen():
    same = [kernel_distance(*clouds(800, 800, seed=seed), block=80) for seed in range(30)]
    mean = np.mean([result.distance for result in same])
    assert abs(mean) < 3 * np.mean([stderr(result) for result in same]) / 30**0.5
    shifted = kernel_distance(*clouds(2000, 2000, shift=0.3), block=200)
    assert shifted.distance > 10 * stderr(shifted)


def test_sorted_data_are_dealt_to_blocks_evenly():
    x, y = clouds(1000, 1000)
    x, y = x + (torch.arange(1000) // 100).unsqueeze(1), y + (torch.arange(1000) // 100).flip(0).unsqueeze(1)
    found = kernel_distance(x, y, block=100)
    assert abs(found.distance) < 4 * stderr(found)


def test_too_few_images_or_other_features_are_plain_errors():
    with pytest.raises(EvaluationError, match="at least 2 images on each side, got 1, 5"):
        kernel_distance(*clouds(1, 5))
    with pytest.raises(EvaluationError, match="6 features with 4"):
        kernel_distance(torch.zeros(5, 6), torch.zeros(5, 4))


def test_inception_score_of_sure_and_even_classes_is_the_number_of_classes():
    score = InceptionScore(5, 200)
    score.add(torch.arange(200), torch.eye(5)[torch.arange(200) % 5])
    assert score.result() == pytest.approx((5.0, 0.0), abs=1e-9)
    unsure = InceptionScore(5, 200)
    unsure.add(torch.arange(200), torch.full((200, 5), 0.2))
    assert unsure.result() == pytest.approx((1.0, 0.0), abs=1e-6)


def test_inception_score_follows_the_closed_form_of_a_flipped_class():
    # Two classes, the right one with probability q: KL = log 2 - H(q).
    q = 0.9
    score = InceptionScore(2, 100, splits=1)
    rows = torch.tensor([[q, 1 - q], [1 - q, q]], dtype=torch.float64)[torch.arange(100) % 2]
    score.add(torch.arange(100), rows)
    entropy = -q * math.log(q) - (1 - q) * math.log(1 - q)
    assert score.result()[0] == pytest.approx(2 * math.exp(-entropy), rel=1e-12)


def test_inception_score_agrees_with_torch_fidelity_and_does_not_depend_on_the_order():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.randn(300, 7, generator=torch.Generator().manual_seed(1)) * 2
    wanted = isc_features_to_metric(logits, splits=10, shuffle=False)
    probabilities = logits.double().softmax(dim=1)
    whole, parts = InceptionScore(7, 300), InceptionScore(7, 300)
    whole.add(torch.arange(300), probabilities)
    for places in torch.randperm(300, generator=torch.Generator().manual_seed(2)).split(17):
        part = InceptionScore(7, 300)
        part.add(places, probabilities[places])
        parts.merge(part)
    assert whole.result()[0] == pytest.approx(wanted["inception_score_mean"], rel=1e-5)
    assert whole.result()[1] == pytest.approx(wanted["inception_score_std"], rel=1e-4)
    assert parts.result() == pytest.approx(whole.result(), rel=1e-12)


@pytest.mark.parametrize(
    "bad", [torch.tensor([[0.5, 0.2]]), torch.tensor([[1.5, -0.5]]), torch.tensor([[torch.nan, 1]])]
)
def test_what_is_no_probability_is_refused(bad):
    with pytest.raises(EvaluationError, match="sum to 1"):
        InceptionScore(2, 1).add(torch.tensor([0]), bad)


def test_a_score_of_nothing_is_an_error():
    with pytest.raises(EvaluationError, match="at least one"):
        InceptionScore(2, 10).result()
    with pytest.raises(EvaluationError, match="different totals"):
        InceptionScore(2, 10).merge(InceptionScore(2, 11))
