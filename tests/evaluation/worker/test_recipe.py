"""The settings of an evaluation: written into every result, and named by a hash that later versions must find again."""

from dataclasses import replace

import pytest

from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.worker.recipe import EvaluationSettings, load_recipes

DESCRIBED = {
    "weights": "ema-0.100",
    "sampling": {
        "guidance": 1.0, "guide": "ab", "attn_temp": 1.0, "annealed": True, "denoise": 1.0, "noise_std": 0.1,
        "param_dtype": "float32", "seed": 0, "labels": "balanced: i % num_classes",
    },
    "num_samples": 24,
    "features": "efficientnet_lite0",
    "features_file": None,
    "reference_images": 0,
    "validation_images": 0,
    "likelihood": "gaussian, standard deviation 0.1 in [-1, 1], seed 0, 4 draws",
    "grid": [3, 4],
    "train_fingerprint": "train",
    "validation_fingerprint": "val",
    "neighbour_samples": 1000,
    "neighbour_images": 10_000,
    "keep_features": 10_000,
    "max_nonfinite_share": 0.05,
}  # fmt: skip


def settings_of(config):
    """The settings of a run whose data sets have fixed fingerprints."""
    return replace(EvaluationSettings.of_run(config), train_fingerprint="train", validation_fingerprint="val")


def test_settings_are_described_as_in_results_written_before(make_run):
    """The texts and hashes are those of earlier versions: their results must be recognised."""
    assert settings_of(make_run(steps=())[1]).describe() == DESCRIBED


@pytest.mark.parametrize(
    ("sampling", "digest"),
    [
        ({}, "dd83cae242a6"),
        ({"guidance": 0.5, "guide": "a", "attn_temp": 0.3, "annealed": False, "seed": 7}, "5c4ee313ff4d"),
        ({"denoise": 0.0, "param_dtype": "bfloat16"}, "7bc93424363f"),
        ({"labels": "training", "denoise": 0.5}, "2736ce074c69"),
    ],
)
def test_hashes_are_those_of_results_written_before(make_run, sampling, digest):
    assert settings_of(make_run(steps=(), sampling=sampling)[1]).hash == digest


def test_what_does_not_change_an_image_does_not_make_other_settings(make_run):
    run_dir, config = make_run(steps=())
    own = EvaluationSettings.of_run(config)
    overrides = ["sampling.batch_size=3", "sampling.denoise=1"]  # null stands for 1 after gaussian noise
    (recipe,) = load_recipes(run_dir, overrides, lambda line: None)
    assert recipe.own
    assert recipe.settings == own
    assert recipe.settings.hash == own.hash


def test_a_setting_of_sampling_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="guidence"):
        ResolvedSampling().with_changes(guidence=1.0)
