"""The provenance of a set of weights, from its checkpoint and configuration; it travels with the weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.choose_reader import open_data
from tarflow.models.provenance import Provenance
from tarflow.trainer.checkpoint.marker import Checkpoint
from tarflow.trainer.config.ema import power_name
from tarflow.trainer.config.schema import Config


def provenance_of(
    checkpoint: Checkpoint, config: Config, which: str, chosen: Mapping[str, Any] | None = None, **known: Any
) -> Provenance:
    """The provenance of the set `which` ("raw", "ema-0.050", ...).

    `chosen`: sampling settings that override the configuration's; `known`: fields that the caller knows better.
    """
    widths = {power_name(std): std for std in config.ema.relative_stds}
    classes = checkpoint.info.get("classes")
    facts = {
        "weights": which,
        "ema_relative_std": widths.get(which),
        "step": checkpoint.step,
        "images_seen": checkpoint.images_seen,
        "run": checkpoint.info.get("run"),
        "noise": config.train.noise,
        "noise_std": config.train.noise_std if config.train.noise == "gaussian" else 0.0,
        "noise_range": config.train.noise_range,
        "likelihood_noise": config.likelihood_noise if config.train.noise_range else None,
        "label_dropout": config.train.label_dropout if config.model.num_classes else None,
        "classes": None if classes is None else tuple(classes),
        "sampling": config.sampling.model_dump(mode="json", exclude={"batch_size"}) | dict(chosen or {}),
        "code": checkpoint.info.get("code"),
    }
    return Provenance(**(facts | known))


def names_of_checkpoint(checkpoint: Checkpoint, config: Config) -> Sequence[str] | None:
    """Class names of a checkpoint's model: those that it records, or else those of its very data set, if it is there."""
    names: Sequence[str] | None = checkpoint.info.get("classes")
    if names is None and config.model.num_classes:
        try:
            data = open_data(config.data)
        except DataError:  # it has moved, is a stream, or comes from code that nobody has named here
            return None
        names = data.classes if data.fingerprint == checkpoint.info.get("data") else None
    return names
