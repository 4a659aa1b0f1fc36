"""Precision, recall, density, coverage: configurations done by hand, and brute force."""

import pytest
import torch

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics import precision_recall as manifold
from tarflow.evaluation.metrics.precision_recall import manifold_scores


def brute_force(sampled, real, k_precision, k_coverage):
    def distance(a, b):
        return float((a.double() - b.double()).norm())

    def radius(rows, i, k):
        return sorted(distance(rows[i], other) for j, other in enumerate(rows) if j != i)[k - 1]

    rim = 1 + 1e-12
    narrow = [radius(real, i, k_precision) * rim for i in range(len(real))]
    wide = [radius(real, i, k_coverage) * rim for i in range(len(real))]
    ours = [radius(sampled, i, k_precision) * rim for i in range(len(sampled))]
    n, m = len(sampled), len(real)
    return (
        sum(any(distance(s, r) <= narrow[i] for i, r in enumerate(real)) for s in sampled) / n,
        sum(any(distance(s, r) <= ours[j] for j, s in enumerate(sampled)) for r in real) / m,
        sum(distance(s, r) <= wide[i] for s in sampled for i, r in enumerate(real)) / (k_coverage * n),
        sum(any(distance(s, r) <= wide[i] for s in sampled) for i, r in enumerate(real)) / m,
    )


def figures(found):
    return found.precision, found.recall, found.density, found.coverage


@pytest.mark.parametrize(("n", "m", "shift"), [(25, 31, 0.0), (31, 25, 0.8), (20, 20, 4.0)])
def test_agrees_with_brute_force_in_blocks_of_any_size(n, m, shift, monkeypatch):
    rng = torch.Generator().manual_seed(n)
    sampled, real = torch.randn(n, 3, generator=rng) + shift, torch.randn(m, 3, generator=rng) + 100
    sampled = sampled + 100
    wanted = brute_force(sampled, real, 3, 5)
    assert figures(manifold_scores(sampled, real)) == pytest.approx(wanted, abs=1e-12)
    monkeypatch.setattr(manifold, "BLOCK", 7)
    assert figures(manifold_scores(sampled, real)) == pytest.approx(wanted, abs=1e-12)


def test_a_line_of_points_done_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    sampled = torch.tensor([[1.4], [1.6], [30.0]])
    # k = 1. Radii: real 1, 1, 1, 1, 7; samples 0.2, 0.2, 28.4.
    # 1.4 lies in the balls of 1 and 2, 1.6 too, 30 in none; 30's ball holds 2, 3 and 10, the others none.
    found = manifold_scores(sampled, real, k_precision=1, k_coverage=1)
    assert figures(found) == pytest.approx((2 / 3, 3 / 5, 4 / 3, 2 / 5))


def test_equal_sets_are_precise_and_covered_and_far_ones_are_neither():
    rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    same, far = manifold_scores(rows, rows), manifold_scores(rows + 1000, rows)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density > 1
    assert figures(far) == (0, 0, 0, 0)


def test_a_set_that_lost_its_variety_is_precise_without_recall():
    rng = torch.Generator().manual_seed(1)
    real = torch.randn(200, 2, generator=rng)
    narrow = manifold_scores(torch.randn(200, 2, generator=rng) * 0.2, real)
    assert narrow.precision > 0.9
    assert narrow.recall < 0.3
    assert narrow.coverage < 0.5


def test_agrees_with_torch_fidelity_on_precision_and_recall():
    from torch_fidelity.metric_prc import prc_features_to_metric

    rng = torch.Generator().manual_seed(2)
    sampled, real = torch.randn(120, 5, generator=rng) * 0.8, torch.randn(150, 5, generator=rng)
    wanted = prc_features_to_metric(sampled, real, prc_neighborhood=3, prc_batch_size=1000, verbose=False)
    found = manifold_scores(sampled, real)
    assert found.precision == pytest.approx(wanted["precision"], abs=1e-6)
    assert found.recall == pytest.approx(wanted["recall"], abs=1e-6)


def test_too_few_images_are_a_plain_error():
    with pytest.raises(EvaluationError, match="more than 5 images on each side, got 5 and 9"):
        manifold_scores(torch.zeros(5, 2), torch.zeros(9, 2))
