"""A flow that is told the noise level, through everything that evaluates: samples, results, sweeps, likelihoods, Python."""

import json
from typing import Any

import pytest
import torch

import tarflow
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.latents.decode import DecodeRequest, decode_latents
from tarflow.evaluation.latents.encode import EncodeRequest, encode_images
from tarflow.evaluation.likelihood.measure import LikelihoodRequest, measure_likelihoods
from tarflow.evaluation.metrics.bits_per_dim import NoiseSettings, measure_bits_per_dim
from tarflow.evaluation.report.build import write_report
from tarflow.evaluation.run_config import run_config
from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.samples.draw_to_folder import SampleRequest, sample_images
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.samples.weights_source import from_checkpoint
from tarflow.evaluation.start.estimate import Work
from tarflow.evaluation.sweep.candidates import SweepRequest, sweep_candidates
from tarflow.evaluation.sweep.guidance import sweep_guidance
from tarflow.evaluation.sweep_file import load_sweep
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.evaluation.worker.recipe import file_recipe
from tarflow.models.denoise import denoise_in_steps, flow_score, schedule
from tarflow.models.noise import to_model_range
from tarflow.models.provenance import Provenance
from tarflow.models.sampling.sequential import sample
from tarflow.models.weights import read_weights, save_weights_file
from tarflow.trainer.checkpoint.find import find
from tests.evaluation.conftest import model_config

RANGE = (0.05, 0.3)
SECTIONS = {
    "model": model_config(noise_conditioning=True, input_scale=1.25).model_dump(),
    "train": {"global_batch_size": 16, "max_images": 320, "noise_std": 0.0, "noise_range": list(RANGE)},
    "sampling": {"guidance": 0.5, "denoise_steps": 3, "batch_size": 16},
}


@pytest.fixture
def iterative(make_run):
    """A run directory, its configuration and the source of its evaluated weights."""
    run_dir, config = make_run(steps=(20,), **SECTIONS)
    return run_dir, config, from_checkpoint(config, find(run_dir), config.evaluated_weights, torch.device("cpu"))


def test_a_sample_is_the_inverse_at_t1_denoised_down_to_nothing(iterative):
    _, config, source = iterative
    resolved = ResolvedSampling.of_run(config)
    sampler = Sampler(source.model, resolved)
    drawn = sampler.draw([0, 1, 2], with_trajectory=True)
    y = torch.tensor([0, 1, 2])
    noisy = sample(source.model, sampler.noise([0, 1, 2]), y, resolved.settings).clone()
    assert torch.equal(drawn.noisy, noisy)
    levels = schedule(0.3, 0.05, 3)
    clean = denoise_in_steps(noisy, levels, flow_score(source.model, y))
    torch.testing.assert_close(drawn.images, clean, rtol=1e-5, atol=1e-6)
    assert len(drawn.denoising) == 4
    assert torch.equal(drawn.denoising[0], noisy)
    assert (clean - noisy).abs().max() > 1e-3


@pytest.mark.parametrize("stochastic", [False, True])
def test_sample_i_is_the_same_image_whoever_draws_it(iterative, stochastic):
    _, config, source = iterative
    sampling = ResolvedSampling.of_run(config).with_changes(denoise_stochastic=stochastic)
    every = Sampler(source.model, sampling).draw(range(5)).images
    for part in ([3], [4, 0, 3]):
        again = Sampler(source.model, sampling).draw(part).images
        torch.testing.assert_close(again, every[part], rtol=1e-5, atol=1e-6)
    other = Sampler(source.model, sampling.with_changes(denoise_stochastic=not stochastic)).draw(range(5)).images
    assert (other - every).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@pytest.mark.usefixtures("fake_features")
def test_a_result_says_at_which_levels_and_the_report_shows_the_way_down(iterative):
    run_dir, _, _ = iterative
    evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    folder = run_dir / "evals" / "images-000000000320"
    result = json.loads((folder / "result.json").read_text())
    sampling = result["settings"]["sampling"]
    assert [sampling[key] for key in ("noise_level", "denoise_to", "denoise_steps", "denoise", "noise_std")] == [
        0.3, 0.05, 3, 1.0, 0.3,
    ]  # fmt: skip
    assert result["likelihood"]["noise"].startswith("gaussian, standard deviation 0.05 in [-1, 1], told to the model")
    assert {"grid-noisy.png", "trajectory.png", "denoising.png"} <= {path.name for path in folder.glob("*.png")}
    assert Work.of_result(result).denoised == 3
    write_report(run_dir)
    page = (run_dir / "report.html").read_text()
    assert "From noise level t1 to 0" in page
    assert "noise level 0.3 on the left" in page
    assert "held-out images at noise level 0.05" in page
    assert "no result under the run's own settings" not in page


def test_every_likelihood_is_the_density_at_the_stated_level(iterative, digit_like, tmp_path):
    run_dir, config, source = iterative
    flow = tarflow.load(run_dir)
    from tarflow.evaluation.images.data_set import ImageSet

    images = ImageSet(config.data.held_out, config.model)
    pixels, labels, _ = (torch.cat(parts) for parts in zip(*images.batches(True)))
    found = {}
    for level in (0.05, 0.2):
        noise = NoiseSettings("gaussian", level, config.sampling.seed, told=True)
        found[level] = measure_bits_per_dim(source.model, images.batches(True), noise)["bits_per_dim"]
        bits = flow.bits_per_dim(pixels, labels, noise_level=level)
        assert float(bits.mean()) == pytest.approx(found[level], abs=1e-6)
    assert found[0.05] != pytest.approx(found[0.2], abs=1e-3)
    request = LikelihoodRequest(
        source=run_dir, data=digit_like / "val", out=tmp_path / "table", settings={"noise_std": 0.2}, device="cpu"
    )
    summary = measure_likelihoods(request, lambda _: None)
    assert summary["bits_per_dim"] == pytest.approx(found[0.2], abs=1e-6)
    assert sum(summary["parts"].values()) == pytest.approx(found[0.2], abs=1e-6)
    assert "0.2 in [-1, 1], told to the model" in summary["noise"]
    with pytest.raises(EvaluationError, match=r"noise level 0\.5 .*0\.05 to 0\.3"):
        flow.log_prob(pixels, labels, noise_level=0.5)


def test_latents_and_paths_are_those_of_one_level(iterative, digit_like, tmp_path):
    run_dir, _, _ = iterative
    encode_images(
        EncodeRequest(source=run_dir, data=digit_like / "val", out=tmp_path / "z", device="cpu"), lambda _: None
    )
    decoded = decode_latents(
        DecodeRequest(source=run_dir, latents=tmp_path / "z", out=tmp_path / "x", device="cpu"), lambda _: None
    )
    assert decoded.max_error is not None
    assert decoded.max_error < 1e-4
    flow = tarflow.load(run_dir)
    image = torch.full((1, 8, 8), 100, dtype=torch.uint8)
    path = flow.interpolate(image, image.flip(2) + 50, steps=3, label=1)
    assert (path[0].int() - image.int()).abs().max() <= 1
    z = flow.encode(image[None], [0], noise_level=0.2)
    torch.testing.assert_close(flow.decode(z, [0], noise_level=0.2), to_model_range(image[None]), rtol=0, atol=1e-4)
    assert not torch.equal(z, flow.encode(image[None], [0]))
    x = to_model_range(image[None])
    expected = denoise_in_steps(x, schedule(0.3, 0.05, 3), flow_score(flow.model, torch.tensor([0])))
    torch.testing.assert_close(flow.denoise(x, [0]), expected, rtol=1e-5, atol=1e-6)


def test_a_weights_file_is_sampled_by_the_levels_that_it_records(iterative, tmp_path):
    _, _, source = iterative
    known = Provenance(noise="gaussian", noise_std=0.0, noise_range=RANGE, label_dropout=0.1)
    for name, provenance in (("known", known), ("unknown", Provenance())):
        save_weights_file(tmp_path / f"{name}.safetensors", source.model.config, source.model.state_dict(), provenance)
    lines: list[str] = []
    request = SampleRequest(
        source=tmp_path / "known.safetensors", out=tmp_path / "s", num=2, settings={"denoise_steps": 2}, device="cpu"
    )
    assert sample_images(request, lines.append)
    settings = json.loads((tmp_path / "s" / "settings.json").read_text())["sampling"]
    assert (settings["noise_level"], settings["denoise_to"], settings["denoise_steps"]) == (0.3, 0.05, 2)
    with pytest.raises(EvaluationError, match="do not record the noise levels"):
        tarflow.load(tmp_path / "unknown.safetensors")
    for name in ("unknown", "known"):
        told = tarflow.load(tmp_path / f"{name}.safetensors", noise_std=0.2, denoise_steps=2)
        image = told.sample(1)
        assert image.shape == (1, 1, 8, 8)
        assert torch.equal(told.bits_per_dim(image), told.bits_per_dim(image, noise_level=0.2))
        assert not torch.equal(told.bits_per_dim(image), told.bits_per_dim(image, noise_level=0.1))
        assert torch.equal(told.encode(image), told.encode(image, noise_level=0.2))
        with pytest.raises(EvaluationError, match=r"noise level -0\.2 .*lies outside"):
            told.bits_per_dim(image, noise_level=-0.2)
        with pytest.raises(EvaluationError, match=r"noise level 0 .*lies outside"):
            told.encode(image, noise_level=0.0)


def test_exported_weights_are_measured_at_the_level_of_their_run(make_run, tmp_path):
    run_dir, config = make_run(steps=(20,), **SECTIONS, evaluation={"likelihood_noise": 0.2})
    source = from_checkpoint(config, find(run_dir), "raw", torch.device("cpu"))
    save_weights_file(tmp_path / "w.safetensors", config.model, source.model.state_dict(), source.provenance)
    image = torch.full((1, 1, 8, 8), 100, dtype=torch.uint8)
    run, exported = tarflow.load(run_dir, "raw"), tarflow.load(tmp_path / "w.safetensors")
    expected = run.bits_per_dim(image, noise_level=0.2)
    assert torch.equal(run.bits_per_dim(image), expected)
    assert torch.equal(exported.bits_per_dim(image), expected)
    overrides = [f"data.train={config.data.train}"]
    file = read_weights(tmp_path / "w.safetensors")
    assert file_recipe(tmp_path / "w.safetensors", file, overrides).settings.likelihood.std == 0.2
    changed = file_recipe(tmp_path / "w.safetensors", file, [*overrides, "evaluation.likelihood_noise=0.1"])
    assert changed.settings.likelihood.std == 0.1


def test_a_path_between_images_is_that_of_the_level_asked_for_and_takes_no_steps(iterative):
    run_dir, _, _ = iterative
    flow = tarflow.load(run_dir)
    image = torch.full((1, 8, 8), 100, dtype=torch.uint8)
    ends = (image, image.flip(2) + torch.arange(8, dtype=torch.uint8) * 9)
    lowest = flow.interpolate(*ends, steps=3, label=1)
    told = flow.interpolate(*ends, steps=3, label=1, noise_level=0.2)
    assert torch.equal(lowest, flow.interpolate(*ends, steps=3, label=1, noise_level=0.05))
    assert not torch.equal(lowest[1], told[1])
    assert (told[[0, 2]].int() - torch.stack(ends).int()).abs().max() <= 1
    assert torch.equal(told, flow.interpolate(*ends, steps=3, label=1, noise_std=0.2))
    steps: list[tuple[str, Any]] = [
        ("denoise_steps", 2), ("denoise_stochastic", True), ("denoise_to", 0.1), ("denoise_schedule", "geometric"),
    ]  # fmt: skip
    for name, value in steps:
        with pytest.raises(EvaluationError, match=f"{name}=.*path from or to the image a"):
            flow.interpolate(*ends, steps=3, label=1, **{name: value})


def test_noise_std_means_the_level_of_a_told_flow_and_nothing_once_another_is_loaded(iterative, make_run):
    flow = tarflow.load(iterative[0])
    assert torch.equal(flow.sample(2, noise_std=0.2), flow.sample(2, noise_level=0.2))
    assert not torch.equal(flow.sample(2, noise_std=0.2), flow.sample(2))
    with pytest.raises(EvaluationError, match=r"noise_level=0\.5 lies outside train\.noise_range"):
        flow.sample(2, noise_std=0.5)
    plain = tarflow.load(make_run(steps=(20,))[0])
    with pytest.raises(EvaluationError, match=r"noise_std=0\.2 .*tarflow\.load"):
        plain.sample(2, noise_std=0.2)


def test_a_sweep_varies_the_level_and_the_steps(iterative):
    run_dir, config, _ = iterative
    own = ResolvedSampling.of_run(config)
    request = SweepRequest(run=run_dir, guidance=[0.0, 1.0], noise_level=[0.1, 0.3], denoise_steps=[2, 4])
    found = sweep_candidates(request, own, config, lambda _: None)
    pairs = {(c.settings.guidance, c.settings.noise_level, c.settings.denoise_steps, c.noise_std) for c in found}
    assert pairs == {(w, t, n, t) for w in (0, 1) for t in (0.1, 0.3) for n in (2, 4)}
    request.noise_level = [0.5]
    with pytest.raises(EvaluationError, match=r"noise_level=0\.5 .*noise_range"):
        sweep_candidates(request, own, config, lambda _: None)


@pytest.mark.usefixtures("fake_features")
def test_a_sweep_records_and_chooses_them(iterative):
    run_dir, _, _ = iterative
    request = SweepRequest(
        run=run_dir,
        guidance=[0.0],
        noise_level=[0.1, 0.3],
        denoise_steps=[2],
        start=8,
        final=8,
        choose="best",
        device="cpu",
    )
    sweep_guidance(request, lambda _: None)
    (record,) = (load_sweep(path) for path in run_dir.glob("sweeps/*/sweep.json"))
    points = record["rounds"][-1]["points"]
    assert {(point["noise_level"], point["denoise_steps"]) for point in points} <= {(0.1, 2), (0.3, 2)}
    chosen = run_config(run_dir).sampling
    assert (chosen.noise_level, chosen.denoise_steps) == (record["best"]["noise_level"], 2)


@pytest.mark.parametrize(
    "settings", [{"noise_level": 0.2}, {"denoise_steps": 5}, {"denoise_stochastic": True}, {"denoise_to": 0.1}], ids=str
)
def test_a_model_that_is_told_nothing_has_no_levels(make_run, settings):
    run_dir, _ = make_run(steps=(20,))
    with pytest.raises(EvaluationError, match=r"needs model\.noise_conditioning=true"):
        tarflow.load(run_dir, **settings)


def test_nor_is_it_measured_at_one(make_run):
    flow = tarflow.load(make_run(steps=(20,))[0])
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    for measure in (flow.bits_per_dim, flow.log_prob, flow.likelihoods, flow.encode):
        with pytest.raises(
            EvaluationError, match=r"noise level 0\.2 \(noise_level\) is for models with noise_conditioning"
        ):
            measure(image, noise_level=0.2)


def test_the_last_level_lies_below_the_first(iterative):
    run_dir, _, _ = iterative
    with pytest.raises(EvaluationError, match=r"denoise_to=0\.2 is above sampling\.noise_level=0\.1"):
        tarflow.load(run_dir, noise_level=0.1, denoise_to=0.2)
