"""Everything that decides the figures of a result. Equal settings, equal result; the hash of them names it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.index import open_index
from evaluation.errors import EvaluationError
from evaluation.likelihood import NoiseSettings
from evaluation.sampling import SamplingSettings
from trainer.config import Config
from trainer.config_io import load_config
from trainer.run_dir import load_run_config

# Bounds on what the comparison with training images looks at; they keep it a small part of an evaluation.
NEIGHBOUR_SAMPLES = 1000
NEIGHBOUR_IMAGES = 10_000
# Share of samples that may be lost as not finite; above it a result has no distance.
MAX_NONFINITE_SHARE = 0.05


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and how. Batch sizes and devices are not here: they do not change figures beyond rounding."""

    weights: str
    sampling: SamplingSettings
    num_samples: int
    features: str
    reference_images: int
    validation_images: int
    likelihood: NoiseSettings
    grid: tuple[int, int]
    train_fingerprint: str
    validation_fingerprint: str | None
    neighbour_samples: int = NEIGHBOUR_SAMPLES
    neighbour_images: int = NEIGHBOUR_IMAGES
    max_nonfinite_share: float = MAX_NONFINITE_SHARE

    @classmethod
    def of_run(cls, config: Config) -> "EvaluationSettings":
        """The settings that a run's configuration asks for. Opens the indexes of its data sets."""
        e = config.evaluation
        held_out = config.data.validation
        return cls(
            weights=config.evaluated_weights,
            sampling=SamplingSettings.of_run(config),
            num_samples=e.num_samples,
            features=e.features,
            reference_images=e.reference_images,
            validation_images=e.validation_images,
            likelihood=NoiseSettings(config.train.noise, config.train.noise_std, config.sampling.seed),
            grid=e.grid,
            train_fingerprint=open_index(config.data.train, config.data.access).fingerprint,
            validation_fingerprint=open_index(held_out, config.data.access).fingerprint if held_out else None,
        )

    def describe(self) -> dict[str, Any]:
        """Plain values, for result files."""
        described: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return described | {"sampling": self.sampling.describe(), "likelihood": self.likelihood.describe()}

    @property
    def hash(self) -> str:
        """Twelve hex digits."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:12]


def load_settings(run_dir: Path, overrides: list[str]) -> tuple[Config, EvaluationSettings, bool]:
    """(configuration, settings, whether they are the run's own) of a run under `section.key=value` overrides.

    Only what evaluation decides can be overridden: the sections sampling and evaluation, and where the data lie.
    """
    own_config = load_run_config(run_dir)
    if not overrides:
        return own_config, EvaluationSettings.of_run(own_config), True
    for override in overrides:
        if not override.startswith(("sampling.", "evaluation.", "data.train=", "data.validation=")):
            raise EvaluationError(
                f"override {override!r}: an evaluation takes settings of the sections sampling and evaluation, and "
                "data.train and data.validation; everything else belongs to the run as it was trained"
            )
    config = load_config(run_dir / "config.yaml", overrides)
    settings = EvaluationSettings.of_run(config)
    try:
        own = settings == EvaluationSettings.of_run(own_config)
    except DataError:  # the run's own data sets are not where they were: that is what the override mends
        own = False
    return config, settings, own
