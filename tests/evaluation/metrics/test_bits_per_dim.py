"""Bits per dimension: the same figure however it is computed, and the right one."""

import math

import pytest
import torch

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.bits_per_dim import BitsPerDim, NoiseSettings, measure_bits_per_dim
from tarflow.models.flow import flow_loss
from tarflow.models.likelihood import bits_from_nats


def data(n=20, seed=0):
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 1, 8, 8), generator=rng, dtype=torch.uint8)
    return pixels, torch.arange(n) % 3, torch.arange(n) + 100


def batches(tensors, size):
    return zip(*(t.split(size) for t in tensors))


def test_the_figure_does_not_depend_on_batches_order_or_workers(model):
    noise = NoiseSettings("gaussian", 0.1, seed=5)
    results = [measure_bits_per_dim(model, batches(data(130), size), noise) for size in (1, 7, 64)]
    shuffle = torch.randperm(130, generator=torch.Generator().manual_seed(1))
    results.append(measure_bits_per_dim(model, batches([t[shuffle] for t in data(130)], 6), noise))
    parts = [BitsPerDim(noise), BitsPerDim(noise)]
    for i, batch in enumerate(batches(data(130), 3)):
        parts[i % 2].add(model, *batch)
    parts[1].merge(parts[0])
    results.append(parts[1].result())
    for result in results[1:]:
        assert result["bits_per_dim"] == pytest.approx(results[0]["bits_per_dim"], abs=1e-6)
        assert result["stderr"] == pytest.approx(results[0]["stderr"], abs=1e-6)


def test_the_figure_equals_the_training_loss_in_bits(model):
    pixels, labels, ids = data()
    noise = NoiseSettings("gaussian", 0.1, seed=5)
    with torch.no_grad():
        each = torch.as_tensor(bits_from_nats(flow_loss(*model(noise.apply(pixels, ids.tolist()), labels)))).double()
    result = measure_bits_per_dim(model, [(pixels, labels, ids)], noise)
    assert result["bits_per_dim"] == pytest.approx(float(each.mean()), abs=1e-5)
    assert result["stderr"] == pytest.approx(float(each.std() / math.sqrt(20)), rel=1e-4)
    assert result["images"] == 20
    assert result["noise"] == "gaussian, standard deviation 0.1 in [-1, 1], seed 5"


@pytest.mark.case("S11")
def test_the_constants_of_pixels_and_prior_are_all_there(make_model):
    """The identity flow on uniform data: its cross-entropy with a standard normal is known in closed form."""
    identity = make_model(nvp=False, num_classes=0)
    with torch.no_grad():
        for block in identity.blocks:
            block.proj_out.weight.zero_()
            block.proj_out.bias.zero_()
    pixels, labels, ids = data(400)
    uniform = NoiseSettings("uniform", 0.0)
    x = uniform.apply(pixels, ids.tolist())
    assert x.min() >= -1
    assert x.max() < 1
    result = measure_bits_per_dim(identity, [(pixels, labels, ids)], uniform)
    # -log2 N(x; 0, 1) averaged over uniform x in [-1, 1], plus 7: 0.5 log2(2 pi) + (1/3) / (2 ln 2) + 7
    assert result["bits_per_dim"] == pytest.approx(0.5 * math.log2(2 * math.pi) + 1 / (6 * math.log(2)) + 7, abs=2e-3)


def test_noise_belongs_to_the_sample_not_to_its_place():
    pixels, _, _ = data(3)
    noise = NoiseSettings("gaussian", 0.1)
    a = noise.apply(pixels, [10, 11, 12])
    b = noise.apply(pixels[[2, 0]], [12, 10])
    assert torch.equal(a[[2, 0]], b)


@pytest.mark.case("S03")
def test_an_infinite_likelihood_is_said_not_averaged(model):
    with torch.no_grad():
        model.blocks[0].proj_out.bias.fill_(torch.nan)
    result = measure_bits_per_dim(model, batches(data(4), 2), NoiseSettings("gaussian", 0.1))
    assert result["bits_per_dim"] is None
    assert result["nonfinite"] == 4


def test_an_empty_or_repeating_set_is_an_error(model):
    noise = NoiseSettings("gaussian", 0.1)
    with pytest.raises(EvaluationError, match="no held-out images"):
        measure_bits_per_dim(model, [], noise)
    with pytest.raises(EvaluationError, match="sample 100 of the held-out images was added twice"):
        measure_bits_per_dim(model, [*batches(data(), 20), *batches(data(), 20)], noise)


@pytest.mark.case("S11")
def test_a_uniform_density_has_eight_bits_under_every_draw_and_bound(model, monkeypatch):
    """Whatever the noise, the density of a uniform distribution on [-1, 1] is 1/2 per value."""
    monkeypatch.setattr(
        "tarflow.evaluation.metrics.bits_per_dim.bits_per_dim", lambda model, x, y, noise: torch.full((len(x),), 8.0)
    )
    result = measure_bits_per_dim(model, batches(data(6), 4), NoiseSettings("uniform", 0, draws=3))
    assert (result["bits_per_dim"], result["importance_weighted"], result["stderr"]) == (8.0, 8.0, 0.0)


def test_draws_are_averaged_and_weighted_as_the_formula_says(model):
    noise = NoiseSettings("uniform", 0.0, seed=2, draws=5)
    pixels, labels, ids = data(4)
    found = measure_bits_per_dim(model, [(pixels, labels, ids)], noise)
    with torch.no_grad():
        nats = torch.stack(
            [
                -flow_loss(*model(noise.apply(pixels, ids.tolist(), k), labels)) * 64 - 32 * math.log(2 * math.pi)
                for k in range(5)
            ]
        ).double()  # log p(x + u_k), in model range
    bits = 7 - nats / (64 * math.log(2))
    weighted = 7 - (nats.logsumexp(0) - math.log(5)) / (64 * math.log(2))
    assert found["bits_per_dim"] == pytest.approx(float(bits.mean()), abs=1e-5)
    assert found["importance_weighted"] == pytest.approx(float(weighted.mean()), abs=1e-5)
    assert found["importance_weighted"] < found["bits_per_dim"]
    assert found["stderr"] == pytest.approx(float(bits.mean(0).std() / 2), rel=1e-3)
    assert found["noise"] == "uniform dequantisation, seed 2, 5 draws"
    assert len({tuple(noise.apply(pixels, ids.tolist(), k).flatten().tolist()) for k in range(5)}) == 5
    gaussian = measure_bits_per_dim(model, [(pixels, labels, ids)], NoiseSettings("gaussian", 0.1, draws=2))
    assert gaussian["importance_weighted"] is None
    assert gaussian["draws"] == 2
