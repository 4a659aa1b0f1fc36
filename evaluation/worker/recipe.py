"""Everything that decides a result. Equal settings give equal results; their hash names the result."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.choose_reader import open_data
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log, no_log
from tarflow.evaluation.metrics.bits_per_dim import NoiseSettings
from tarflow.evaluation.result_file import settings_digest
from tarflow.evaluation.run_config import TRAINED, as_trained, run_config
from tarflow.evaluation.samples.file_sampling import stored_sampling
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.models.weights import WeightsFile
from tarflow.trainer.checkpoint.marker import Checkpoint
from tarflow.trainer.config.files import build_config
from tarflow.trainer.config.schema import Config


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and how. Batch sizes and devices are not included: they change metrics by rounding only."""

    weights: str
    sampling: ResolvedSampling
    num_samples: int
    features: str
    features_file: str | None
    reference_images: int
    validation_images: int
    likelihood: NoiseSettings
    grid: tuple[int, int]
    train_fingerprint: str
    validation_fingerprint: str | None
    neighbour_samples: int
    neighbour_images: int
    keep_features: int
    max_nonfinite_share: float

    @classmethod
    def of_run(cls, config: Config) -> "EvaluationSettings":
        """The settings in a run's configuration. Opens the indexes of its data sets."""
        e = config.evaluation
        data, held_out = config.data, config.data.held_out
        return cls(
            weights=config.evaluated_weights,
            sampling=ResolvedSampling.of_run(config),
            num_samples=e.num_samples,
            features=e.features,
            features_file=str(e.features_file) if e.features_file else None,
            reference_images=e.reference_images,
            validation_images=e.validation_images,
            likelihood=NoiseSettings(
                config.train.noise,
                config.likelihood_noise,
                config.sampling.seed,
                e.likelihood_draws,
                told=config.model.noise_conditioning,
            ),
            grid=e.grid,
            train_fingerprint=open_data(data).fingerprint,
            validation_fingerprint=open_data(held_out).fingerprint if held_out else None,
            neighbour_samples=e.neighbour_samples,
            neighbour_images=e.neighbour_images,
            keep_features=e.keep_features,
            max_nonfinite_share=e.max_nonfinite_share,
        )

    def describe(self) -> dict[str, Any]:
        """Plain values, for result files."""
        parts = {"sampling": self.sampling.describe(), "likelihood": self.likelihood.describe()}
        described: dict[str, Any] = json.loads(json.dumps(vars(self) | parts))
        return described

    @property
    def hash(self) -> str:
        """Twelve hex digits."""
        return settings_digest(self.describe())


OVERRIDABLE = ("sampling", "evaluation", "data")  # sections


@dataclass(frozen=True)
class Recipe:
    """One way of evaluating a checkpoint: the run's own settings, or one of its variants."""

    config: Config
    settings: EvaluationSettings
    own: bool  # the run's own settings, not overridden and no variant
    final: bool = False  # of the run's last checkpoint alone, see `evaluation.final_num_samples`

    def of(self, checkpoint: Checkpoint, log: Log = no_log) -> "Recipe":
        """The recipe with the noise that a checkpoint was trained with. Raises EvaluationError where they contradict."""
        config = as_trained(self.config, checkpoint, log)
        if config is self.config:
            return self
        return replace(
            self, config=config, settings=replace(EvaluationSettings.of_run(config), weights=self.settings.weights)
        )


def load_recipes(run_dir: Path, overrides: list[str], log: Log = print) -> list[Recipe]:
    """The run's own settings under `section.key=value` overrides, those of its end, then each of `evaluation.variants`.

    Only what belongs to evaluation can be overridden: the sections sampling and evaluation, and the data's paths.
    """
    for override, key in zip(overrides, _keys(overrides)):
        if not _overridable(key):
            raise EvaluationError(
                f"override {override!r}: an evaluation takes settings of the sections sampling, evaluation and "
                "data; everything else belongs to the run as it was trained"
            )
    own_config = run_config(run_dir)
    config = run_config(run_dir, overrides, log)
    own_config.data.allow_code_of(config.data)
    settings = EvaluationSettings.of_run(config)
    own = not overrides
    if overrides:
        try:
            own = settings == EvaluationSettings.of_run(own_config)
        except DataError:  # the run's own data sets were moved, which the override is there for
            own = False
    recipes = [Recipe(config, settings, own)]
    at_end = _at_the_end(config, _keys(overrides))
    if at_end is not None and (changed := EvaluationSettings.of_run(at_end)) != settings:
        recipes.append(Recipe(at_end, changed, own=False, final=True))
    for variant in config.evaluation.variants:
        other = config.with_variant(variant)
        changed = EvaluationSettings.of_run(other)
        if changed not in (recipe.settings for recipe in recipes):
            recipes.append(Recipe(other, changed, False))
    return recipes


def _at_the_end(config: Config, overridden: list[str]) -> Config | None:
    """The configuration for the run's last checkpoint; None if nothing is set for it.

    Who overrides `evaluation.num_samples` for this evaluation does not mean the last checkpoint to get more.
    """
    given = {name: value for name, value in config.evaluation.final.items()
             if f"evaluation.{name}" not in overridden or f"evaluation.final_{name}" in overridden}  # fmt: skip
    if not given:
        return None
    return config.changed(evaluation=given | {"variants": ()})


# What a weights file may record of its training; an override where it does not.
TRAINING = tuple(f"train.{name}" for name in TRAINED)


def file_recipe(path: Path, file: WeightsFile, overrides: list[str]) -> Recipe:
    """How a weights file is evaluated: model, noise and sampling settings come from the file, the rest from overrides.

    Raises EvaluationError for an override that contradicts the file, and where neither gives the noise.
    """
    given = set(_keys(overrides))
    for key in given:
        if not _overridable(key) and key not in TRAINING:
            raise EvaluationError(
                f"override {key}: the evaluation of a weights file takes settings of the sections data, sampling and "
                f"evaluation, and {', '.join(TRAINING)} where the file does not record them"
            )
    if "data.train" not in given:
        raise EvaluationError(f"{path} does not record what it was trained on: give data.train=FOLDER")
    known = file.provenance.model_dump(include={key.partition(".")[2] for key in TRAINING}, exclude_none=True)
    if file.config.noise_conditioning and "noise_range" not in known and "train.noise_range" not in given:
        raise EvaluationError(
            f"{path} does not record the noise levels that it was trained on, one of which its model has to be told: give "
            "train.noise_range=[t0,t1]"
        )
    # Required settings that an evaluation never reads (batch, images) get the smallest value that validates.
    tree = {
        "data": {"train": ""},
        "model": file.config.model_dump(mode="json"),
        "train": {"global_batch_size": 1, "max_images": 1} | known,
        "ema": {"relative_stds": []},
        "log": {"tensorboard": False},
        "sampling": stored_sampling(path, file.provenance.sampling).model_dump(mode="json"),
        "evaluation": {"likelihood_noise": file.provenance.likelihood_noise},
    }
    config = build_config(tree, str(path), overrides)
    for name, value in known.items():
        if getattr(config.train, name) != value:
            raise EvaluationError(
                f"override train.{name}={getattr(config.train, name)}, but {path} was trained with {value}: leave it out"
            )
    known_settings = given | {f"train.{name}" for name in known}
    if (
        config.train.noise_range is None
        and "train.noise_std" not in known_settings
        and (config.train.noise == "gaussian" or "train.noise" not in known_settings)
    ):
        raise EvaluationError(
            f"{path} does not record its noise: give train.noise_std=S (its standard deviation), or train.noise=uniform"
        )
    settings = replace(EvaluationSettings.of_run(config), weights="file")
    return Recipe(config, settings, own=False)


def _keys(overrides: list[str]) -> list[str]:
    """The keys of overrides, in order."""
    return [override.partition("=")[0] for override in overrides]


def _overridable(key: str) -> bool:
    section, dot, _ = key.partition(".")
    return bool(dot) and section in OVERRIDABLE


def load_settings(run_dir: Path, overrides: list[str]) -> tuple[Config, EvaluationSettings, bool]:
    """(configuration, settings, whether they are the run's own), without the variants."""
    recipe = load_recipes(run_dir, overrides)[0]
    return recipe.config, recipe.settings, recipe.own
