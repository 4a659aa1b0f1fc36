"""Certificates of samples: whose, by index; what a result says of them; and the other paths through the sampler."""

import numpy as np
import pytest
import torch

from tarflow.evaluation.metrics.certificates import Certificates
from tarflow.evaluation.samples.draw import SampleCount, Sampler
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.models.errors import ModelError
from tarflow.models.sampling.plan import BlockPlan, SamplingPlan, conditions_of


def sampling(**changes):
    return ResolvedSampling().with_changes(**{"guidance": 1.5, "noise_std": 0.2, **changes})


def test_every_nth_sample_has_one_in_any_batch(model):
    sampler = Sampler(model, sampling(certify_every=4))
    for size in (10, 3, 1):
        count = SampleCount()
        for drawn in sampler.draw_all(range(10), size):
            count.add(drawn)
        assert count.certificates.indices == [0, 4, 8]
        said = count.describe()["certificate"]
        assert said["samples"] == 3
        assert 0 < said["maximum"] <= 2e-5
        assert len(said["maximum_by_block"]) == 2
    none = Sampler(model, sampling(certify_every=0)).draw(range(3))
    assert torch.isnan(none.certificate).all()


@pytest.mark.parametrize("method", ["fixed_point", "auto"])
@pytest.mark.case("S01")
def test_other_methods_draw_the_same_samples_and_certify_what_was_iterated(model, method):
    exact = Sampler(model, sampling(denoise=1.0)).draw(range(6))
    sampler = Sampler(model, sampling(denoise=1.0, method=method))
    for size in (6, 2):
        drawn = list(sampler.draw_all(range(6), size))
        assert (torch.cat([d.noisy for d in drawn]) - exact.noisy).abs().max() <= 1e-4
        assert (torch.cat([d.images for d in drawn]) - exact.images).abs().max() <= 5e-4
        certificate = torch.cat([d.certificate for d in drawn])
        assert (certificate[~torch.isnan(certificate)] <= 1e-4).all()
        if method == "fixed_point":
            assert not torch.isnan(certificate).any()


def test_a_bfloat16_sample_is_held_to_the_float32_flow(model):
    fast = Sampler(model, sampling(param_dtype="bfloat16", certify_every=1)).draw(range(4))
    exact = Sampler(model, sampling(certify_every=1)).draw(range(4))
    assert fast.certificate.min() > 20 * exact.certificate.max()


def test_samples_that_no_iteration_settles_are_counted(model):
    sampler = Sampler(model, sampling(method="fixed_point"))
    honest = sampler.noise

    def noise(indices):
        rows = honest(indices)
        rows[1] = torch.nan
        return rows

    sampler.noise = noise  # type: ignore[method-assign]
    count = SampleCount()
    count.add(sampler.draw(range(4)))
    merged = SampleCount()
    merged.merge(count.arrays())
    for found in (count, merged):
        said = found.describe()
        assert (said["redone_sequentially"], said["nonfinite"]) == (1, 1)
        assert said["certificate"]["samples"] == 3


def test_counts_of_a_version_without_certificates_are_merged():
    merged = SampleCount()
    merged.merge({"sums": np.array([8, 8, 0, 10, 0]), "nonfinite": np.array([], dtype=np.int64)})
    assert (merged.asked, merged.redone, merged.certificates.describe()) == (8, 0, {"samples": 0})


def test_quantiles_are_those_of_the_largest_block():
    found = Certificates()
    found.add(range(101), torch.stack([torch.arange(101) * 1e-6, torch.zeros(101)], 1).double())
    found.add([101], torch.tensor([[torch.inf, 0.0]]).double())
    said = found.describe()
    assert said == {
        "samples": 102, "not_finite": 1, "maximum": 1e-4, "quantiles": {"0.5": 5e-5, "0.9": 9e-5, "0.99": 9.9e-5},
        "maximum_by_block": [1e-4, 0.0],
    }  # fmt: skip


def test_a_plan_of_other_weights_guidance_or_tolerance_is_refused(model):
    made = sampling(method="auto")
    plan = SamplingPlan(
        blocks=[BlockPlan()] * 2, conditions=conditions_of(model.config, made.settings, "a" * 64), machine={}
    )
    Sampler(model, made).take_over(plan, "a" * 64)
    with pytest.raises(ModelError, match=r"made for weights 'aaa.*measure it again \(sampling.method=auto\)"):
        Sampler(model, made).take_over(plan, "b" * 64)
    for change in ({"guidance": 2.0}, {"tolerance": 1e-3}, {"guide_blocks": (0,)}):
        with pytest.raises(ModelError, match=f"made for {next(iter(change))} "):
            Sampler(model, made.with_changes(**change)).take_over(plan, "a" * 64)


def test_a_result_keeps_its_name_unless_a_later_setting_is_used():
    plain = ResolvedSampling().describe()
    assert not {"method", "tolerance", "certify_every", "guidance_form", "guide_blocks"} & plain.keys()
    assert sampling(guide_blocks=(-1,)).describe()["guide_blocks"] == [-1]
    assert sampling(method="auto") != sampling()
