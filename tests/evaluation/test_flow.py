"""Trained weights from Python: the same images and figures as the commands give, and errors in words."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import tarflow
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.latents.encode import EncodeRequest, encode_images
from tarflow.evaluation.latents.store import open_latents, read_shard
from tarflow.evaluation.likelihood.measure import LikelihoodRequest, measure_likelihoods
from tarflow.evaluation.metrics.bits_per_dim import NoiseSettings, measure_bits_per_dim
from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.samples.draw_to_folder import SampleRequest, sample_images
from tarflow.evaluation.samples.png_folder import load_png
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.samples.weights_source import from_checkpoint
from tarflow.models.errors import ModelError
from tarflow.models.provenance import Provenance
from tarflow.models.weights import save_weights_file
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.errors import TrainerError

KNOWN = Provenance(noise="gaussian", noise_std=0.1, label_dropout=0.1, classes=("cat", "dog", "emu"))


@pytest.fixture
def flow(model, tmp_path):
    save_weights_file(tmp_path / "w.safetensors", model.config, model.state_dict(), KNOWN)
    return tarflow.load(tmp_path / "w.safetensors")


@pytest.fixture
def digits(model, tmp_path):
    """A flow whose classes are those of the shared data set."""
    known = KNOWN.model_copy(update={"classes": ("0", "1", "2")})
    save_weights_file(tmp_path / "w.safetensors", model.config, model.state_dict(), known)
    return tarflow.load(tmp_path / "w.safetensors")


def pictures(num=5, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (num, 1, 8, 8), dtype=np.uint8))


def test_a_run_gives_the_images_that_its_evaluation_draws(make_run):
    run_dir, config = make_run()
    flow = tarflow.load(run_dir)
    source = from_checkpoint(config, find(run_dir), config.evaluated_weights, torch.device("cpu"))
    wanted = Sampler(source.model, ResolvedSampling.of_run(config)).draw(range(5)).pixels()
    assert torch.equal(flow.sample(5), wanted)
    assert torch.equal(flow.sample(2, first=3), wanted[3:])
    assert not torch.equal(flow.sample(5, seed=1), wanted)
    assert flow.source.weights == config.evaluated_weights
    assert tarflow.load(run_dir, "raw").source.weights == "raw"


def test_the_mean_over_a_data_set_is_the_evaluated_figure(make_run):
    run_dir, config = make_run()
    flow = tarflow.load(run_dir)
    images = ImageSet(config.data.held_out, config.model)
    noise = NoiseSettings(config.train.noise, config.train.noise_std, seed=3, draws=2)
    evaluated = measure_bits_per_dim(flow.model, images.batches(True), noise)["bits_per_dim"]
    pixels, labels, ids = (torch.cat(parts) for parts in zip(*images.batches(True)))
    assert ids.tolist() == list(range(len(ids)))
    bits = flow.bits_per_dim(pixels, labels, draws=2, seed=3)
    assert bits.dtype == torch.float64
    assert abs(float(bits.mean()) - evaluated) < 1e-6
    # Any part of the set, in batches of any size, gives the same images' figures.
    flow.batch_size = 2
    torch.testing.assert_close(
        flow.bits_per_dim(pixels[3:8], labels[3:8], draws=2, seed=3, first=3), bits[3:8], atol=1e-5, rtol=0
    )
    nats = flow.log_prob(pixels, labels, draws=2, seed=3)
    torch.testing.assert_close(7 - nats / (64 * np.log(2)), bits, atol=1e-5, rtol=0)


def test_floats_are_taken_as_they_are(flow):
    x = torch.randn(3, 1, 8, 8)
    z, logdet = flow.model(x)
    normal = -0.5 * (z.square().sum((1, 2)) + 64 * np.log(2 * np.pi))
    torch.testing.assert_close(flow.log_prob(x, draws=3), (normal + 64 * logdet).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("labels", [None, "dog", 2, ["cat", 1, None, "none", "name:emu"], np.array([0, 1, 2, -1, 0])])
def test_decoding_inverts_encoding(flow, labels):
    images = pictures()
    z = flow.encode(images, labels)
    assert z.shape == (5, 4, 16)
    back = flow.decode(z, labels)
    torch.testing.assert_close(back, images.float() / 127.5 - 1, atol=1e-5, rtol=0)


def test_labels_may_be_names_numbers_or_none(flow):
    assert flow.classes == ("cat", "dog", "emu")
    assert torch.equal(flow.sample(6, ["cat", 1, None]), flow.sample(6, [0, "dog", -1]))
    assert torch.equal(flow.sample(3), flow.sample(3, [0, 1, 2]))
    assert not torch.equal(flow.sample(3, "emu"), flow.sample(3, "cat"))
    assert torch.equal(flow.log_prob(pictures(2), "dog"), flow.log_prob(pictures(2), torch.tensor([1, 1])))


def test_a_number_is_a_number_although_a_class_is_named_like_another_ones(model, tmp_path):
    known = KNOWN.model_copy(update={"classes": ("2", "0", "1")})
    save_weights_file(tmp_path / "w.safetensors", model.config, model.state_dict(), known)
    flow = tarflow.load(tmp_path / "w.safetensors")
    assert torch.equal(flow.sample(2, [0, 2]), flow.sample(2, ["name:2", "name:1"]))
    assert torch.equal(flow.log_prob(pictures(1), torch.tensor([1])), flow.log_prob(pictures(1), "name:0"))
    with pytest.raises(EvaluationError, match="labels: '1' could be"):
        flow.sample(1, "1")


def test_denoising_uses_the_noise_of_training(flow, model):
    x = torch.randn(2, 1, 8, 8)
    score = torch.autograd.functional.jacobian(
        lambda x: flow.model(x)[1].sum() * 64 - 0.5 * flow.model(x)[0].square().sum(), x
    )
    torch.testing.assert_close(flow.denoise(x), x + 0.01 * score, atol=1e-5, rtol=1e-5)


def test_of_no_images_there_is_nothing(flow):
    assert flow.sample(0).shape == (0, 1, 8, 8)
    assert flow.encode(pictures(0)).shape == (0, 4, 16)
    assert flow.decode(torch.zeros(0, 4, 16)).shape == flow.denoise(torch.zeros(0, 1, 8, 8)).shape == (0, 1, 8, 8)
    assert flow.log_prob(pictures(0)).shape == (0,)


def test_the_best_of_several_is_the_commands(flow, tmp_path):
    request = SampleRequest(source=tmp_path / "w.safetensors", out=tmp_path / "out", num=3, best_of=4)
    sample_images(request, lambda _: None)
    best = flow.sample(3, best_of=4)
    assert torch.equal(best, torch.stack([load_png(tmp_path / "out/images" / f"{i:06d}.png") for i in range(3)]))
    assert torch.equal(flow.sample(1, first=2, best_of=4, batch_size=1), best[2:])
    assert torch.equal(flow.sample(3, best_of=1), flow.sample(3))
    assert not torch.equal(best, flow.sample(3))


def test_likelihoods_are_the_commands_with_their_parts_and_errors(digits, tmp_path, digit_like):
    request = LikelihoodRequest(
        source=tmp_path / "w.safetensors", data=digit_like / "val", out=tmp_path / "out", draws=3, seed=2
    )
    measure_likelihoods(request, lambda _: None)
    table = pq.read_table(tmp_path / "out/likelihood.parquet").to_pydict()
    digits.batch_size = 5
    pixels, labels, numbers = digits.images(digit_like / "val")
    assert (numbers.tolist(), labels.tolist()) == (table["image"], table["label"])
    found = digits.likelihoods(pixels, labels, draws=3, seed=2)
    for name, column in (("bits_per_dim", found.mean), ("stderr", found.stderr), ("prior", found.parts[:, 0])):
        np.testing.assert_allclose(column, table[name], atol=1e-5)
    np.testing.assert_allclose(found.mean, digits.bits_per_dim(pixels, labels, draws=3, seed=2), atol=1e-6)
    np.testing.assert_allclose(
        digits.likelihoods(pixels[4:6], labels[4:6], draws=3, seed=2, first=4).bits, found.bits[4:6], atol=1e-5
    )
    some, one, few = digits.images(digit_like / "val", num=3, labels=1)
    assert (one.tolist(), few.tolist()) == ([1, 1, 1], [0, 4, 8])
    assert torch.equal(some, pixels[few])


def test_noisy_latents_are_the_commands(digits, tmp_path, digit_like):
    request = EncodeRequest(source=tmp_path / "w.safetensors", data=digit_like / "val", out=tmp_path / "z", noisy=True)
    encode_images(request, lambda _: None)
    stored = read_shard(tmp_path / "z", open_latents(tmp_path / "z"), 0)
    pixels, labels, _ = digits.images(digit_like / "val")
    z = digits.encode(pixels, labels, noisy=True)
    np.testing.assert_allclose(z, stored["z"], atol=1e-5)
    assert torch.equal(digits.encode(pixels[3:5], labels[3:5], noisy=True, first=3), z[3:5])
    assert not torch.equal(digits.encode(pixels, labels), z)


def test_names_and_batches_may_be_given(model, make_run, tmp_path):
    known = KNOWN.model_copy(update={"classes": None})
    save_weights_file(tmp_path / "w.safetensors", model.config, model.state_dict(), known)
    (tmp_path / "names.json").write_text('["cat", "dog", "emu"]')
    for names in (["cat", "dog", "emu"], tmp_path / "names.json", str(tmp_path / "names.json")):
        flow = tarflow.load(tmp_path / "w.safetensors", classes=names, batch_size=2)
        assert flow.classes == ("cat", "dog", "emu")
        assert torch.equal(flow.sample(2, "emu"), flow.sample(2, 2))
    assert flow.batch_size == 2
    assert tarflow.load(make_run()[0], batch_size=3).batch_size == 3
    save_weights_file(tmp_path / "w.safetensors", model.config, model.state_dict(), KNOWN)
    with pytest.raises(EvaluationError, match=r"^classes: class 1 is 'cow' there, and 'dog' in"):
        tarflow.load(tmp_path / "w.safetensors", classes=["cat", "cow", "emu"])
    with pytest.raises(EvaluationError, match="batch_size=0: at least one"):
        tarflow.load(tmp_path / "w.safetensors", batch_size=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.sample(1, "cow"), "labels: no class is named 'cow'"),
        (lambda f: f.sample(1, 7), "labels: label 7 is not one of the model's 3 classes"),
        (lambda f: f.sample(1, {"cat": 1}), "not a mapping"),
        (lambda f: f.sample(1, guidance=-1), "sampling.guidance cannot be -1"),
        (lambda f: f.sample(1, method="auto", param_dtype="bfloat16"), "sampling.method=auto .*float32"),
        (lambda f: f.log_prob(pictures(3), [0, 1]), "2 labels for 3 images"),
        (
            lambda f: f.bits_per_dim(pictures(3).float()),
            r"reach from \d+ to \d+, as grey levels do: give these as uint8",
        ),
        (lambda f: f.encode(pictures(3).numpy().astype("float64")), "as grey levels do"),
        (lambda f: f.sample(-1), r"sample\(-1\): the number of images cannot be below 0"),
        (lambda f: f.log_prob(pictures(3)[:, :, :4]), r"images must have the shape \[N, 1, 8, 8\], not \[3, 1, 4, 8\]"),
        (lambda f: f.log_prob(pictures(3).long()), "must be uint8"),
        (lambda f: f.log_prob(pictures(3), draws=0), "draws=0"),
        (lambda f: f.likelihoods(pictures(3), draws=0), "draws=0"),
        (lambda f: f.likelihoods(pictures(3) / 255), "likelihoods takes uint8 images"),
        (lambda f: f.encode(pictures(3) / 255, noisy=True), "noisy=True is for uint8 images"),
        (lambda f: f.sample(1, best_of=0), "best_of=0 is out of bounds: it may be 1 to 10,000"),
        (lambda f: f.sample(1, best_of=2, temperature=0), "best_of=2 chooses among samples, and at temperature=0 all"),
        (lambda f: f.images("nowhere"), "nowhere: there is no such data set or folder"),
        (lambda f: f.decode(torch.zeros(3, 64)), r"latents must have the shape \[N, 4, 16\], not \[3, 64\]"),
    ],
)
def test_what_has_no_meaning_is_refused_in_words(flow, call, message):
    with pytest.raises(EvaluationError, match=message):
        call(flow)


def test_an_unknown_setting_is_named(flow):
    with pytest.raises(TypeError, match="guidence"):
        flow.sample(1, guidence=2)


def test_guidance_of_a_flow_that_cannot_be_guided_is_refused(model, tmp_path):
    known = KNOWN.model_copy(update={"label_dropout": 0.0})
    save_weights_file(tmp_path / "w.safetensors", model.config, model.state_dict(), known)
    with pytest.raises(EvaluationError, match="label dropout"):
        tarflow.load(tmp_path / "w.safetensors").sample(1, guidance=2.0)


def test_a_file_without_its_noise_has_to_be_told(model, tmp_path):
    save_weights_file(tmp_path / "w.pth", model.config, model.state_dict())
    with pytest.raises(EvaluationError, match="does not say its training noise"):
        tarflow.load(tmp_path / "w.pth")
    told = tarflow.load(tmp_path / "w.pth", noise_std=0.1)
    known = tmp_path / "w.safetensors"
    save_weights_file(known, model.config, model.state_dict(), KNOWN)
    assert torch.equal(told.log_prob(pictures()), tarflow.load(known).log_prob(pictures()))
    free = tarflow.load(tmp_path / "w.pth", noise_std=0.0)
    assert free.sample(1).shape == (1, 1, 8, 8)
    with pytest.raises(EvaluationError, match="does not record its training noise"):
        free.log_prob(pictures())


def test_what_was_inferred_is_said(model, tmp_path, make_run):
    lines: list[str] = []
    run_dir, config = make_run()
    tarflow.load(run_dir, log=lines.append)
    assert find(run_dir).name in lines[-1]
    assert f"weights {config.evaluated_weights}" in lines[-1]
    save_weights_file(tmp_path / "w.safetensors", model.config, model.state_dict(), KNOWN)
    tarflow.load(tmp_path / "w.safetensors", log=lines.append)
    assert any("trained on Gaussian noise of standard deviation 0.1" in line for line in lines)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(TrainerError):
        tarflow.load(tmp_path / "run")
    with pytest.raises(ModelError):
        tarflow.load(tmp_path / "w.safetensors")


def test_an_image_that_is_not_finite_is_an_error(flow):
    with torch.no_grad():
        flow.model.blocks[0].proj_out.bias.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="2 of 2 samples are not finite"):
        flow.sample(2)


def test_public_names_load_with_their_first_use():
    assert tarflow.DataSettings is DataSettings
    assert set(tarflow.__all__) <= set(dir(tarflow))
    for name in tarflow.__all__:
        assert getattr(tarflow, name) is not None
