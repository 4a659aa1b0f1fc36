"""What a checkpoint and its configuration say of a set of weights; it goes with the weights wherever they go."""

from collections.abc import Mapping
from typing import Any

from tarflow.models.provenance import Provenance
from tarflow.trainer.checkpoint.commit import Checkpoint
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
