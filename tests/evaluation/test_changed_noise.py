"""A run whose noise was changed on a resume: each checkpoint is sampled and measured by what it was trained with."""

import json

import pytest
import torch

import tarflow
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.latents.encode import EncodeRequest, encode_images
from tarflow.evaluation.likelihood.measure import LikelihoodRequest, measure_likelihoods
from tarflow.evaluation.run_config import choose
from tarflow.evaluation.sweep.candidates import SweepRequest, sweep_candidates
from tarflow.evaluation.sweep.guidance import sweep_guidance
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate, waiting
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import save_config
from tarflow.trainer.saving.resume import check_resume
from tests.evaluation.conftest import model_config, write_checkpoint

TOLD = {
    "model": model_config(noise_conditioning=True).model_dump(),
    "train": {"global_batch_size": 16, "max_images": 320, "noise_std": 0.0, "noise_range": [0.05, 0.4]},
    "sampling": {"guidance": 0.5, "denoise_steps": 2, "batch_size": 16},
}
PIXELS = torch.arange(128, dtype=torch.uint8).view(2, 1, 8, 8)


def go_on(run_dir, config, **sections):
    """What a resume with other settings leaves: the run's new configuration, and its checkpoint at 320 images."""
    tree = config.model_dump()
    for section, values in sections.items():
        tree[section] |= values
    changed = Config.model_validate(tree)
    save_config(run_dir, changed)
    write_checkpoint(run_dir, changed, 20, 320, scale=0.02)
    return changed


def drawn(run_dir, **chosen):
    flow = tarflow.load(run_dir, **chosen)
    return flow.sample(3), flow.bits_per_dim(PIXELS), flow.encode(PIXELS)


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, {"noise_std": 0.3}), (TOLD, {"noise_range": [0.01, 0.9]}), ({}, {"label_dropout": 0.2})],
    ids=["noise", "levels", "labels"],
)
def test_an_older_checkpoint_draws_and_measures_what_it_did_before(make_run, before, after):
    run_dir, config = make_run(steps=(10,), **before)
    was, known = drawn(run_dir), tarflow.load(run_dir).provenance
    go_on(run_dir, config, train=after)
    lines: list[str] = []
    flow = tarflow.load(run_dir, images=160, log=lines.append)
    assert flow.provenance == known
    assert all(map(torch.equal, drawn(run_dir, images=160), was))
    (name, value) = next(iter(after.items()))
    assert any(
        f"images-000000000160 was trained with train.{name}=" in line and f"(now {value})" in line for line in lines
    )
    newest: list[str] = []
    assert tarflow.load(run_dir, log=newest.append).provenance.model_dump()[name] == (
        tuple(value) if isinstance(value, list) else value
    )
    assert not any("was trained with train." in line for line in newest)


@pytest.mark.usefixtures("fake_features")
@pytest.mark.parametrize(
    ("before", "after", "stds"),
    [({}, {"noise_std": 0.3}, (0.1, 0.3)), (TOLD, {"noise_range": [0.01, 0.9]}, (0.05, 0.01))],
)
def test_each_checkpoint_is_evaluated_once_under_its_own_noise(make_run, before, after, stds):
    run_dir, config = make_run(steps=(10,), **before)
    write_checkpoint(run_dir, config, 15, 240)
    assert len(evaluate(run_dir, False, WorkerOptions(images=160), lambda _: None).done) == 1
    go_on(run_dir, config, train=after)
    assert [names for _, names in waiting(run_dir, WorkerOptions())] == [["images-000000000240", "images-000000000320"]]
    outcome = evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    assert not outcome.failed
    assert len(outcome.done) == 2
    for images, std in ((160, stds[0]), (240, stds[0]), (320, stds[1])):
        result = json.loads((run_dir / f"evals/images-{images:012d}/result.json").read_text())
        assert result["likelihood"]["noise"].startswith(f"gaussian, standard deviation {std:g} ")
    assert [names for _, names in waiting(run_dir, WorkerOptions())] == [[]]
    assert evaluate(run_dir, False, WorkerOptions(), lambda _: None).done == []


@pytest.mark.usefixtures("fake_features")
def test_settings_that_do_not_go_with_its_noise_are_said_with_both_sides_and_stop_no_other(make_run):
    run_dir, config = make_run(steps=(10,), **TOLD)
    go_on(run_dir, config, train={"noise_range": [0.01, 0.9]}, sampling={"noise_level": 0.8})
    both = r"trained with train\.noise_range=\[0\.05, 0\.4\] \(now \[0\.01, 0\.9\]\), and sampling\.noise_level=0\.8 lies outside"
    with pytest.raises(EvaluationError, match=both):
        tarflow.load(run_dir, images=160)
    outcome = evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    assert [result["images_seen"] for result in outcome.done] == [320]
    assert list(outcome.failed) == ["images-000000000160"]
    assert "sampling.noise_level=0.8 lies outside" in outcome.failed["images-000000000160"]
    request = SweepRequest(run=run_dir, guidance=[0.0], start=8, final=8, images=160, device="cpu", choose="none")
    with pytest.raises(EvaluationError, match=both):
        sweep_guidance(request, lambda _: None)


def test_a_sweeps_choice_that_the_levels_have_left_is_named_and_stops_a_resume_before_it_begins(make_run):
    run_dir, config = make_run(steps=(10,), **TOLD)
    choose(run_dir, {"noise_level": 0.3}, "sweeps/one")
    changed = Config.model_validate(
        config.model_dump() | {"train": config.train.model_dump() | {"noise_range": (0.05, 0.2)}}
    )
    with pytest.raises(TrainerError, match=r"sampling\.json, which sweeps/one chose .*noise_level=0\.3 lies outside"):
        check_resume(find(run_dir), changed, "", False, lambda _: None)
    save_config(run_dir, changed)
    with pytest.raises(EvaluationError, match=r"sampling\.json \(sweeps/one chose noise_level=0\.3\) does not go with"):
        tarflow.load(run_dir, images=160)
    save_config(run_dir, config)
    lines: list[str] = []
    flow = tarflow.load(run_dir, noise_std=0.2, log=lines.append)
    assert flow.sampling.settings.noise_level == 0.2
    assert not any("chosen by" in line for line in lines), "what is not used is not said to be"


def test_no_setting_of_sampling_stands_in_the_way_of_a_measurement(make_run, digit_like, tmp_path):
    run_dir, _ = make_run(steps=(20,), **TOLD | {"sampling": TOLD["sampling"] | {"denoise_to": 0.1}})
    flow = tarflow.load(run_dir)
    given = {"source": run_dir, "data": digit_like / "val", "settings": {"noise_std": 0.06}, "device": "cpu"}
    summary = measure_likelihoods(LikelihoodRequest(**given, out=tmp_path / "bits"), lambda _: None)
    pixels, labels, ids = flow.images(digit_like / "val")
    assert list(ids) == list(range(len(pixels)))
    assert summary["bits_per_dim"] == pytest.approx(
        float(flow.bits_per_dim(pixels, labels, noise_level=0.06).mean()), abs=1e-6
    )
    latents = encode_images(EncodeRequest(**given, out=tmp_path / "z"), lambda _: None)
    assert latents.noise_level == 0.06
    with pytest.raises(EvaluationError, match=r"denoise_to=0\.1 is above sampling\.noise_level=0\.06"):
        flow.sample(1, noise_std=0.06)
    assert flow.sample(1, noise_std=0.06, denoise_steps=1).shape == (1, 1, 8, 8), "one step goes to 0 at once"
    lowest = flow.sampling.with_changes(noise_level=0.1, denoise_steps=7)
    assert lowest.describe()["denoise_steps"] == 1, "between t1 and t0 there is no level"
    assert torch.equal(
        flow.sample(2, noise_level=0.1, denoise_steps=7), flow.sample(2, noise_level=0.1, denoise_steps=1)
    )
    with pytest.raises(EvaluationError, match=r"noise_std=0\.06 and noise_level=0\.2 are two names"):
        flow.sample(1, noise_std=0.06, noise_level=0.2)
    with pytest.raises(EvaluationError, match=r"the noise level 0 .*above 0"):
        flow.sample(1, noise_std=0)


def test_settings_without_an_effect_are_one_candidate(make_run):
    run_dir, config = make_run(steps=(20,), **TOLD)
    own = tarflow.load(run_dir).sampling
    request = SweepRequest(
        run=run_dir, guidance=[0.5], noise_level=[0.2, 0.4], denoise=[0.0, 1.0], denoise_steps=[2, 3]
    )
    found = sweep_candidates(request, own, config, lambda _: None)
    assert len(found) == 2 * (1 + 2)
    assert len({json.dumps(candidate.describe()) for candidate in found}) == 6
