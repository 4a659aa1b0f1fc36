"""Frechet distance: closed forms, other implementations."""

import numpy as np
import pytest
import scipy.linalg
import torch

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics, FrechetInfluence, frechet_distance


def statistics_of(rows, batch=64):
    statistics = FeatureStatistics(rows.shape[1])
    for part in torch.as_tensor(rows).split(batch):
        statistics.add(part)
    return statistics


def with_moments(count, mean, covariance):
    return FeatureStatistics.from_parts(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def rotation(dim, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]


@pytest.mark.parametrize("zeros", [0, 20])
def test_commuting_covariances_follow_the_closed_form_even_when_rank_deficient(zeros):
    rng = np.random.default_rng(1)
    q = rotation(48)
    first, second = rng.uniform(0.1, 4, 48), rng.uniform(0.1, 4, 48)
    first[:zeros] = 0
    second[zeros // 2 : zeros // 2 + zeros] = 0  # overlaps the other's null space in part
    m1, m2 = rng.standard_normal(48), rng.standard_normal(48)
    wanted = ((m1 - m2) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    found = frechet_distance(
        with_moments(1000, m1, q @ np.diag(first) @ q.T), with_moments(1000, m2, q @ np.diag(second) @ q.T)
    )
    assert found.distance == pytest.approx(wanted, rel=1e-8)
    assert found.mean_term == pytest.approx(((m1 - m2) ** 2).sum(), rel=1e-12)


def test_agrees_with_the_matrix_square_root_of_scipy():
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((400, 64)) @ rng.standard_normal((64, 64)) + k for k in (0, 0.3))
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.trace(np.real(scipy.linalg.sqrtm(c1 @ c2)))
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * cross
    assert frechet_distance(statistics_of(a), statistics_of(b)).distance == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1e-3, 1e3), (1e-7, 1e7), (1e-11, 1e11)])
def test_badly_conditioned_covariances_keep_their_digits(low, high):
    q, rng = rotation(40), np.random.default_rng(8)
    first, second = np.geomspace(low, high, 40), rng.permutation(np.geomspace(low, high, 40))
    wanted = ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    sides = [with_moments(10_000, np.zeros(40), q @ np.diag(values) @ q.T) for values in (first, second)]
    # Entries of q diag q^T hold the smallest eigenvalues to one rounding of the largest only.
    assert frechet_distance(*sides).distance == pytest.approx(wanted, rel=1e-8, abs=1e-8)


def test_the_bars_of_one_dimension_follow_the_closed_form():
    one, two = with_moments(10_000, [0.0], [[4.0]]), with_moments(10_000, [3.0], [[0.25]])
    assert frechet_distance(one, two).distance == pytest.approx(3.0**2 + (2 - 0.5) ** 2, rel=1e-14)


def test_agrees_with_torch_fidelity_on_the_same_features():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    rng = np.random.default_rng(12)
    real = rng.standard_normal((900, 48)) @ rng.standard_normal((48, 48))
    fake = rng.standard_normal((700, 48)) @ rng.standard_normal((48, 48)) + 0.2
    theirs = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in (real, fake)]
    wanted = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(statistics_of(real), statistics_of(fake)).distance == pytest.approx(wanted, rel=1e-6)


def test_agrees_with_torchmetrics_on_the_same_features():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Columns(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.float().mean(dim=3).flatten(1) / 255

    metric = FrechetInceptionDistance(feature=Columns(), input_img_size=(3, 4, 9)).set_dtype(torch.float64)
    rng = torch.Generator().manual_seed(3)
    real = torch.randint(0, 256, (200, 3, 4, 9), generator=rng, dtype=torch.uint8)
    fake = torch.randint(0, 200, (150, 3, 4, 9), generator=rng, dtype=torch.uint8)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = frechet_distance(statistics_of(Columns()(real)), statistics_of(Columns()(fake)))
    assert ours.distance == pytest.approx(float(metric.compute()), rel=1e-4)


@pytest.mark.parametrize("count", [5, 63, 1000])
@pytest.mark.case("S06")
def test_few_images_give_a_finite_value_and_a_warning(count):
    rng = np.random.default_rng(count)
    rows = rng.standard_normal((count, 64))
    others = rng.standard_normal((500, 64)) + 0.5
    result = frechet_distance(statistics_of(rows), statistics_of(others), names=("sampled", "reference"))
    assert np.isfinite(result.distance)
    assert result.distance >= 0
    ours, theirs = result.warnings
    assert (f"{count} sampled images for 64 features" in ours) == (count <= 64)
    assert (f"{count:,} sampled images, fewer than 10,000" in ours) == (count > 64)
    assert "500 reference images, fewer than 10,000" in theirs


@pytest.mark.case("S06")
def test_ten_thousand_images_are_enough_for_no_warning():
    enough = with_moments(10_000, np.zeros(8), np.eye(8))
    assert frechet_distance(enough, enough).warnings == []
    assert len(frechet_distance(with_moments(9_999, np.zeros(8), np.eye(8)), enough).warnings) == 1


@pytest.mark.case("S06")
def test_one_image_is_a_plain_error():
    rows = np.random.default_rng(0).standard_normal((10, 8))
    with pytest.raises(EvaluationError, match="at least 2 images on each side; the first side has 1"):
        frechet_distance(statistics_of(rows[:1]), statistics_of(rows))
    with pytest.raises(EvaluationError, match="the second side has 0"):
        frechet_distance(statistics_of(rows), FeatureStatistics(8))


@pytest.mark.parametrize("kind", ["normal", "constant", "shifted", "few"])
@pytest.mark.case("S06")
def test_identical_sets_are_at_distance_zero(kind):
    rows = np.random.default_rng(4).standard_normal((20 if kind == "few" else 300, 64))
    rows = {"constant": np.ones_like(rows) * 3.7, "shifted": rows + 1e4}.get(kind, rows)
    result = frechet_distance(statistics_of(rows), statistics_of(rows, batch=7))
    assert 0 <= result.distance < 1e-6


@pytest.mark.case("S06")
def test_a_set_of_constant_features_against_a_spread_one():
    rows = np.random.default_rng(5).standard_normal((300, 16))
    result = frechet_distance(statistics_of(np.zeros((50, 16))), statistics_of(rows))
    wanted = (rows.mean(0) ** 2).sum() + np.trace(np.cov(rows, rowvar=False))
    assert result.distance == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("shift", [0, 1e4])
@pytest.mark.case("S06")
def test_streaming_equals_two_passes_in_float64_for_every_batching(shift):
    rows = (np.random.default_rng(6).standard_normal((1000, 64)) + shift).astype(np.float32)
    exact = rows.astype(np.float64)
    streams = [statistics_of(rows, batch).parts() for batch in (1, 7, 1000)]
    count, mean, scatter = streams[0]
    assert count == 1000
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scatter, np.cov(exact, rowvar=False) * 999, rtol=1e-6, atol=1e-9 * 999)
    for other in streams[1:]:
        assert torch.equal(other[1], mean)
        assert torch.equal(other[2], scatter)


def test_looking_at_a_stream_does_not_change_it():
    rows = torch.randn(700, 8, generator=torch.Generator().manual_seed(0))
    looked, plain = FeatureStatistics(8), FeatureStatistics(8)
    for part in rows.split(100):
        looked.add(part)
        looked.parts()
        looked.spectrum()
        plain.add(part)
    assert torch.equal(looked.parts()[2], plain.parts()[2])
    assert all(map(torch.equal, looked.spectrum(), statistics_of(rows).spectrum()))
    more = statistics_of(rows[:50] + 1)
    for stream in (looked, plain):
        stream.merge(more)
    for _ in range(2):  # it is kept
        assert all(map(torch.equal, looked.spectrum(), plain.spectrum()))


def test_merged_parts_equal_the_whole_also_with_an_empty_part():
    rows = np.random.default_rng(7).standard_normal((900, 16)) + 1e4
    merged = FeatureStatistics(16)
    for part in (rows[:5], rows[5:5], rows[5:500], rows[500:]):
        merged.merge(statistics_of(part))
    assert merged.count == 900
    np.testing.assert_allclose(merged.parts()[2] / 899, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-10)
    assert frechet_distance(merged, statistics_of(rows)).distance < 1e-6


def drawn(count, dim, seed, change=0.0):
    rng = torch.Generator().manual_seed(seed)
    shape = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(count, dim, generator=rng, dtype=torch.float64) @ (shape + change * torch.eye(dim)) + change


@pytest.mark.case("S06")
def test_the_error_bar_is_the_spread_over_independent_draws():
    reference = statistics_of(drawn(20_000, 12, 1))
    distances, bars, bars_of_parts = [], [], []
    for seed in range(100, 160):
        rows = drawn(800, 12, seed, change=0.5)
        sampled = statistics_of(rows)
        distances.append(frechet_distance(sampled, reference).distance)
        influence = FrechetInfluence(sampled, reference)
        bars.append(influence.stderr(rows))
        bars_of_parts.append(influence.stderr_of_parts([statistics_of(part) for part in rows.split(40)]))
    assert np.mean(bars) == pytest.approx(np.std(distances, ddof=1), rel=0.25)
    assert np.mean(bars_of_parts) == pytest.approx(np.mean(bars), rel=0.1)


@pytest.mark.parametrize("count", [400, 10])  # ten images of twelve features: a singular covariance
def test_the_influence_of_a_row_is_what_leaving_it_out_changes(count):
    reference, rows = statistics_of(drawn(3000, 12, 1)), drawn(count, 12, 2, change=0.5)
    whole = frechet_distance(statistics_of(rows), reference).distance
    influence = FrechetInfluence(statistics_of(rows), reference).of_rows(rows)
    left_out = [
        frechet_distance(statistics_of(torch.cat([rows[:i], rows[i + 1 :]])), reference).distance for i in range(8)
    ]
    changes = (count - 1) * (whole - torch.tensor(left_out, dtype=torch.float64))
    # Both are known up to a constant; with ten rows each is far from small, so the order is all that agrees.
    agreement = torch.corrcoef(torch.stack([changes, influence[:8]]))[0, 1]
    assert agreement > (0.99 if count > 12 else 0.6)
    assert torch.isfinite(influence).all()


def test_an_error_bar_needs_parts():
    rows = drawn(30, 4, 1)
    with pytest.raises(EvaluationError, match="at least two parts"):
        FrechetInfluence(statistics_of(rows), statistics_of(rows)).stderr_of_parts([statistics_of(rows)])


def test_the_bits_of_the_statistics_do_not_depend_on_threads():
    rows = torch.randn(2000, 256, generator=torch.Generator().manual_seed(3))
    one = statistics_of(rows).parts()
    torch.set_num_threads(2)
    two = statistics_of(rows, batch=500).parts()
    assert torch.get_num_threads() == 2
    assert all(torch.equal(a, b) for a, b in zip(one[1:], two[1:]))


def test_a_row_that_is_not_finite_is_refused():
    rows = torch.zeros(4, 3)
    rows[1, 2] = torch.nan
    with pytest.raises(EvaluationError, match="1 of 4 feature rows"):
        FeatureStatistics(3).add(rows)


def test_features_of_two_networks_are_not_compared():
    with pytest.raises(EvaluationError, match="64 features with 8"):
        frechet_distance(statistics_of(np.zeros((4, 64))), statistics_of(np.zeros((4, 8))))
