"""Samples: by index alone, checked, rounded; guidance that means something."""

import pytest
import torch

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw import SampleCount, Sampler, check_guidance
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.models.denoise import denoise
from tarflow.models.flow import FlowBlock
from tarflow.models.noise import to_pixels
from tarflow.models.sampling.sequential import sample
from tarflow.models.sampling.settings import SamplingSettings
from tests.evaluation.conftest import model_config


def sampling(**changes):
    """The default settings with these changes."""
    return ResolvedSampling().with_changes(**changes)


GUIDED = sampling(guidance=1.5, denoise=1.0, noise_std=0.2, seed=3)


def pixels_of(sampler, indices, batch_size):
    return torch.cat([drawn.pixels() for drawn in sampler.draw_all(indices, batch_size)])


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.case("S01")
def test_a_sample_is_the_same_in_any_batch_and_alone(model, param_dtype):
    sampler = Sampler(model, sampling(guidance=1.5, denoise=1.0, noise_std=0.2, param_dtype=param_dtype))
    batches = [pixels_of(sampler, list(range(12)), size).int() for size in (12, 6, 3, 1)]
    for other in batches[1:]:
        assert (other - batches[0]).abs().max() <= 1
    alone = sampler.draw([7])
    assert (alone.pixels()[0].int() - batches[0][7]).abs().max() <= 1
    assert alone.labels.tolist() == [7 % 3]
    backwards = pixels_of(sampler, list(range(12))[::-1], 5).int().flip(0)
    assert (backwards - batches[0]).abs().max() <= 1


@pytest.mark.case("S01")
def test_samples_are_distinct_and_change_with_the_seed(model):
    first = Sampler(model, GUIDED).draw(range(12)).images
    distances = torch.cdist(first.flatten(1), first.flatten(1)) + torch.eye(12)
    assert distances.min() > 1e-2
    other = Sampler(model, sampling(guidance=1.5, denoise=1.0, noise_std=0.2, seed=4)).draw(range(12)).images
    assert not torch.allclose(first, other, atol=0.1)


def test_a_sample_is_what_the_models_own_functions_make_of_its_noise(model):
    sampler = Sampler(model, GUIDED)
    drawn = sampler.draw([4, 5])
    y = torch.tensor([1, 2])
    noisy = sample(model, sampler.noise([4, 5]), y, SamplingSettings(guidance=1.5)).clone()
    torch.testing.assert_close(drawn.noisy, noisy)
    torch.testing.assert_close(drawn.images, denoise(model, noisy, y, 0.2, 1.0))
    assert torch.equal(drawn.pixels(), to_pixels(drawn.images))


@pytest.mark.parametrize(
    "change",
    [
        {"guidance": 0.5}, {"guide": "a"}, {"attn_temp": 0.5}, {"annealed": False}, {"denoise": 0.5},
        {"noise_std": 0.3}, {"seed": 9}, {"labels": (2,)}, {"param_dtype": "bfloat16"},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_has_an_effect(model, change):
    settings = {"guidance": 1.5, "denoise": 1.0, "noise_std": 0.2, "seed": 3}
    base = Sampler(model, sampling(**settings)).draw(range(6)).images
    changed = Sampler(model, sampling(**settings | change)).draw(range(6)).images
    assert (base - changed).abs().max() > 1e-4


def test_labels_are_balanced_or_as_asked(make_model):
    assert Sampler(make_model(), GUIDED).labels(range(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    asked = sampling(labels=(2, -1))
    assert Sampler(make_model(), asked).labels(range(4)).tolist() == [2, -1, 2, -1]
    assert Sampler(make_model(num_classes=0), sampling()).labels(range(3)).tolist() == [-1, -1, -1]


def test_labels_that_the_model_does_not_have_are_refused(make_model):
    with pytest.raises(EvaluationError, match=r"label 3 is not one of the model's 3 classes \(0\.\.2"):
        Sampler(make_model(), sampling(labels=(0, 3)))
    with pytest.raises(EvaluationError, match="has no classes"):
        Sampler(make_model(num_classes=0), sampling(labels=(0,)))


def test_drawing_leaves_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    Sampler(model, sampling(guidance=1.0, denoise=1.0, noise_std=0.1, param_dtype="bfloat16")).draw([0])
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == torch.float32


@pytest.fixture
def broken(model):
    """A sampler of which chosen samples come out not finite, in bfloat16 or always."""

    def make(always=(), in_bfloat16=(), param_dtype="float32"):
        sampler = Sampler(model, sampling(param_dtype=param_dtype))
        honest = sampler.noise

        def noise(indices):
            rows = honest(indices)
            for row, index in enumerate(indices):
                if index in always:
                    rows[row] = torch.inf if index % 2 else torch.nan
            return rows

        sampler.noise = noise  # type: ignore[method-assign]  # where every draw gets its numbers
        if in_bfloat16:
            mark = torch.tensor([[[i in in_bfloat16]] for i in range(8)])

            class Overflowing(FlowBlock):
                def split(self, out):
                    a, b = super().split(out)
                    return a, torch.where(mark, torch.inf, b)

            sampler._fast.blocks[0].__class__ = Overflowing  # the copy in bfloat16, not the model
        return sampler

    return make


@pytest.mark.case("S03")
def test_samples_that_are_not_finite_are_counted_and_left_out(broken):
    sampler = broken(always=(1, 4))
    drawn = sampler.draw(range(8))
    assert drawn.finite.tolist() == [True, False, True, True, False, True, True, True]
    assert drawn.pixels().shape[0] == 6
    assert drawn.finite_indices() == [0, 2, 3, 5, 6, 7]
    honest = Sampler(sampler.model, sampler.sampling).draw(range(8))
    assert torch.equal(drawn.images[drawn.finite], honest.images[drawn.finite])
    count = SampleCount()
    count.add(drawn)
    said = count.describe()
    assert (said["asked"], said["used"], said["nonfinite"], said["nonfinite_share"]) == (8, 6, 2, 0.25)
    assert said["nonfinite_indices"] == [1, 4]
    assert said["retried_in_float32"] == 0  # they were drawn in float32 already
    assert count.problem(0.25) is None
    assert "2 of 8 samples are not finite (25.0%, at most 10.0%" in (count.problem(0.1) or "")


@pytest.mark.case("S03")
def test_a_sample_lost_in_bfloat16_is_drawn_again_in_float32(broken):
    sampler = broken(in_bfloat16=(2, 5), param_dtype="bfloat16")
    drawn = sampler.draw(range(8))
    assert drawn.retried == 2
    assert drawn.finite.all()
    exact = Sampler(sampler.model, sampling()).draw(range(8))
    torch.testing.assert_close(drawn.images[[2, 5]], exact.images[[2, 5]])
    assert not torch.equal(drawn.images[0], exact.images[0])  # the others stay as bfloat16 made them


@pytest.mark.case("S03")
def test_values_out_of_range_are_clamped_and_their_share_is_said(model):
    drawn = Sampler(model, sampling()).draw([0, 1])
    drawn.images[0] = torch.linspace(-1.3, 1.3, 64).view(1, 8, 8)
    drawn.images[1] = 0.5
    pixels = drawn.pixels()
    assert pixels[0].flatten()[0] == 0
    assert pixels[0].flatten()[-1] == 255
    assert pixels[1].unique().tolist() == [191]
    count = SampleCount()
    count.add(drawn)
    assert count.describe()["clamped_value_share"] == pytest.approx(
        (torch.linspace(-1.3, 1.3, 64).abs() > 1).sum() / 128
    )


@pytest.mark.case("S10")
def test_guiding_a_model_that_never_trained_without_labels_is_refused():
    guided = sampling(guidance=2.0)
    with pytest.raises(EvaluationError, match=r"train.label_dropout=0.*never trained"):
        check_guidance(guided, model_config(num_classes=10), label_dropout=0.0)
    check_guidance(guided, model_config(num_classes=10), label_dropout=0.1)
    check_guidance(sampling(), model_config(num_classes=10), label_dropout=0.0)


@pytest.mark.case("S10")
def test_guidance_without_any_effect_is_refused():
    with pytest.raises(EvaluationError, match=r"no effect.*sampling.attn_temp"):
        check_guidance(sampling(guidance=2.0), model_config(num_classes=0), label_dropout=None)
    with pytest.raises(EvaluationError, match="no effect"):
        check_guidance(sampling(guidance=2.0, labels=(-1,)), model_config(num_classes=10), label_dropout=0.1)
    check_guidance(sampling(guidance=0.2, attn_temp=0.3), model_config(num_classes=0), label_dropout=None)


@pytest.mark.case("S10")
def test_weight_zero_is_plain_sampling_and_no_dropout_happens_in_training_mode(model):
    plain = Sampler(model, sampling()).draw(range(4)).images
    torch.testing.assert_close(Sampler(model, sampling(guide="a", attn_temp=0.5)).draw(range(4)).images, plain)
    sampler = Sampler(model.train(), sampling())
    assert torch.equal(sampler.draw(range(4)).images, plain)


def test_labels_by_the_frequencies_of_the_training_data(make_model):
    counts = (10, 60, 30)
    sampler = Sampler(make_model(), sampling(class_counts=counts))
    drawn = sampler.labels(range(2000))
    assert drawn.bincount(minlength=3).tolist() == pytest.approx([200, 1200, 600], rel=0.15)
    assert sampler.labels([1999, 3]).tolist() == [drawn[1999], drawn[3]], "by index alone"
    other = Sampler(make_model(), sampling(class_counts=counts, seed=1)).labels(range(2000))
    assert (other != drawn).any()
    assert Sampler(make_model(), sampling(class_counts=(0, 5, 0))).labels(range(50)).unique().tolist() == [1]


def test_frequencies_are_counted_in_the_training_data(make_run):
    _, config = make_run(steps=(), sampling={"labels": "training"})
    settings = ResolvedSampling.of_run(config)
    assert sum(settings.class_counts) == 48
    said = settings.describe()
    assert said["class_counts"] == list(settings.class_counts)
    assert settings.balanced == ResolvedSampling.of_run(make_run(steps=(), name="other")[1])
