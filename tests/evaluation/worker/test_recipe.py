"""The settings of an evaluation: written into every result, and named by a hash that later versions must find again."""

import re
from dataclasses import replace

import pytest

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.worker.recipe import EvaluationSettings, file_recipe, load_recipes
from tarflow.models.provenance import Provenance
from tarflow.models.weights import read_weights, save_weights_file

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


@pytest.mark.parametrize(("setting", "value"), [
    ("guidance", float("nan")), ("guidance", -1.0), ("guidance", 1e300), ("attn_temp", 0.0), ("attn_temp", float("inf")),
    ("denoise", -1.0), ("seed", -1), ("seed", 2**63), ("batch_size", 0), ("batch_size", 10**9), ("param_dtype", "int8"),
])  # fmt: skip
@pytest.mark.case("H10")
def test_settings_that_are_changed_by_options_have_the_bounds_of_the_configuration(setting: str, value) -> None:
    with pytest.raises(EvaluationError, match=re.escape(f"sampling.{setting} cannot be {value!r}")):
        ResolvedSampling().with_changes(**{setting: value})


UNIFORM = {"noise": "uniform", "noise_std": 0.0}
GAUSSIAN = {"noise": "gaussian", "noise_std": 0.2}


@pytest.fixture
def recipe_of(make_model, tmp_path, digit_like):
    """The recipe for a weights file that says what `known` holds, under overrides."""

    def make(known, *overrides):
        model, path = make_model(), tmp_path / "m.safetensors"
        save_weights_file(path, model.config, model.state_dict(), Provenance(**known))
        return file_recipe(path, read_weights(path), [f"data.train={digit_like / 'train'}", *overrides])

    return make


@pytest.mark.parametrize(
    "overrides", [[], ["train.noise=gaussian"], ["train.noise= gaussian"], ["train.label_dropout=0.1"]]
)
@pytest.mark.case("I07")
def test_noise_that_nobody_says_is_asked_for(recipe_of, overrides):
    with pytest.raises(
        EvaluationError, match=r"does not say its noise: give train\.noise_std=S.*or train\.noise=uniform"
    ):
        recipe_of({}, *overrides)


@pytest.mark.parametrize(
    ("known", "overrides", "likelihood"),
    [
        ({}, ["train.noise_std=0.3"], "gaussian, standard deviation 0.3"),
        ({}, ["train.noise=gaussian", "train.noise_std=0.3"], "gaussian, standard deviation 0.3"),
        ({}, ["train.noise=uniform"], "uniform"),
        ({}, ["train.noise=  uniform"], "uniform"),
        (UNIFORM, [], "uniform"),
        (GAUSSIAN, [], "gaussian, standard deviation 0.2"),
        (GAUSSIAN, ["train.noise=gaussian", "train.noise_std=2e-1"], "gaussian, standard deviation 0.2"),
    ],
)
@pytest.mark.case("I07")
def test_the_noise_is_what_file_or_overrides_say(recipe_of, known, overrides, likelihood):
    recipe = recipe_of(known, *overrides)
    assert recipe.settings.describe()["likelihood"].startswith(likelihood)


@pytest.mark.parametrize(
    ("known", "override", "message"),
    [
        (GAUSSIAN, "train.noise_std=0.1", r"train\.noise_std=0\.1, but .*m\.safetensors was trained with 0\.2"),
        (GAUSSIAN, "train.noise=uniform", r"train\.noise=uniform, but .*m\.safetensors was trained with gaussian"),
        (GAUSSIAN | {"label_dropout": 0.0}, "train.label_dropout=0.1", r"label_dropout=0\.1, but .* with 0\.0"),
    ],
)
@pytest.mark.case("I07")
def test_an_override_that_contradicts_the_file_names_both(recipe_of, known, override, message):
    with pytest.raises(EvaluationError, match=message):
        recipe_of(known, override)


@pytest.mark.parametrize(
    "key", ["train.noises", "train.noise_stdx", "train.seed", "dataset.train", "sampling", "optim.lr"]
)
@pytest.mark.case("I07")
def test_settings_go_by_their_whole_names(recipe_of, make_run, key):
    """`train.noise` begins like others do; a section is one, not the beginning of a word."""
    with pytest.raises(EvaluationError, match=f"override {key}: the evaluation of a weights file takes"):
        recipe_of(GAUSSIAN, f"{key}=1")
    run_dir, _ = make_run(steps=())
    with pytest.raises(EvaluationError, match=rf"override '{key}=1': an evaluation takes"):
        load_recipes(run_dir, [f"{key}=1"])


@pytest.mark.case("V05")
def test_a_file_is_evaluated_with_its_own_sampling_settings(recipe_of):
    own = {"guidance": 1.5, "denoise": 0.5, "labels": "training"}
    described = recipe_of(GAUSSIAN | {"sampling": own}).settings.describe()["sampling"]
    assert (described["guidance"], described["denoise"], described["noise_std"]) == (1.5, 0.5, 0.2)
    assert sum(described["class_counts"]) == 48
    overridden = recipe_of(GAUSSIAN | {"sampling": own}, "sampling.guidance=0", "sampling.labels=balanced")
    assert overridden.settings.describe()["sampling"]["guidance"] == 0


@pytest.mark.case("V05")
def test_a_files_label_dropout_decides_about_guidance(recipe_of, tmp_path):
    from tarflow.evaluation.worker.follow import WorkerOptions, evaluate_file

    recipe = recipe_of(GAUSSIAN | {"label_dropout": 0.0})
    options = WorkerOptions(overrides=[f"data.train={recipe.config.data.train}", "sampling.guidance=2"])
    with pytest.raises(EvaluationError, match="needs a model trained with label dropout, but train"):
        evaluate_file(tmp_path / "m.safetensors", tmp_path / "out", options, lambda line: None)
    assert not (tmp_path / "out").exists()
