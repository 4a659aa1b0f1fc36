"""What a checkpoint and its configuration say of a set of weights; it goes with the weights wherever they go."""

from collections.abc import Mapping, Sequence
from typing import Any

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.storage.open_index import open_index
from tarflow.models.provenance import Provenance
from tarflow.trainer.checkpoint.marker import Checkpoint
from tarflow.trainer.config.ema import power_name
from tarflow.trainer.config.schema import Config


def provenance_of(
    checkpoint: Checkpoint, config: Config, which: str, chosen: Mapping[str, Any] | None = None, **known: Any
) -> Provenance:
    """The provenance of the set `which` ("raw", "ema-0.050", ...).

    `chosen`: settings of the section sampling that replace the configuration's; `known`: fields that the caller knows better.
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
        "label_dropout": config.train.label_dropout if config.model.num_classes else None,
        "classes": None if classes is None else tuple(classes),
        "sampling": config.sampling.model_dump(mode="json", exclude={"batch_size"}) | dict(chosen or {}),
        "code": checkpoint.info.get("code"),
    }
    return Provenance(**(facts | known))


def names_of_checkpoint(checkpoint: Checkpoint, config: Config) -> Sequence[str] | None:
    """The names of the classes of a checkpoint's model, if it tells them or its very data set is at hand."""
    names: Sequence[str] | None = checkpoint.info.get("classes")
    if names is None and config.model.num_classes:
        try:
            index = open_index(config.data.train, config.data.access)
        except DataError:  # it has moved, or is a stream
            return None
        names = index.classes if index.fingerprint == checkpoint.info.get("data") else None
    return names
