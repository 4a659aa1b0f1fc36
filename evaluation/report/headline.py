"""Which result represents a run, in the report and in `tarflow status`.

The headline is the newest checkpoint's result under the run's current settings: its configuration, with the sampling
settings that a sweep chose. Until there is one, the newest result of any settings takes its place, and `differs` names the
settings that are not the run's. Does not import torch.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tarflow.evaluation.report.history import Result
from tarflow.models.sampling.settings import SamplingSettings
from tarflow.trainer.config.schema import Config

_SAMPLING = [name for name in SamplingSettings.model_fields if name not in ("batch_size", "labels")]


@dataclass(frozen=True)
class Headline:
    """A result, and the settings in which it differs from the run's own: setting -> (the result's, the run's)."""

    result: Result
    differs: dict[str, tuple[Any, Any]]
    own_known: bool = True  # False: the run's configuration could not be read
    over_training: Result | None = None  # curves go by this one's settings, where those of the end are others

    @property
    def curve(self) -> Result:
        """The result whose settings the curves over training go by."""
        return self.over_training or self.result

    def describe(self) -> str:
        """The result and its settings as text."""
        own = settings_of(self.result)
        if not self.own_known:
            return f"{self.result.folder.name}: the newest result; the run's own settings are not known"
        if not self.differs:
            listed = ", ".join(f"{key} {_text(own[key])}" for key in ("weights", "guidance", "denoise") if key in own)
            return f"{self.result.folder.name}: the newest result under the run's own settings ({listed})"
        listed = ", ".join(
            f"{key} {_text(here)} instead of {_text(runs)}" for key, (here, runs) in self.differs.items()
        )
        return f"{self.result.folder.name}: no result under the run's own settings yet; this one has {listed}"


def own_settings(config: Config) -> dict[str, Any]:
    """The settings that make two results comparable, of a run's configuration under its sweep's choice."""
    sampling = config.resolved_sampling.described()
    found = {name: sampling[name] for name in _SAMPLING} | {"labels": config.sampling.labels}
    if not config.model.num_classes:
        found["labels"] = "balanced"
    e = config.evaluation
    return found | {"weights": config.evaluated_weights, "num_samples": e.num_samples, "features": e.features}


def settings_of(result: Result) -> dict[str, Any]:
    """The same settings of a result; those that it does not hold are absent."""
    stored, sampling = result.values["settings"], result.sampling
    found = {name: sampling[name] for name in _SAMPLING if name in sampling}
    found["labels"] = "training" if "class_counts" in sampling else "balanced"
    return found | {name: stored[name] for name in ("weights", "num_samples", "features") if name in stored}


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings present in both with unequal values: setting -> (of one, of the other)."""
    return {key: (one[key], other[key]) for key in one if key in other and one[key] != other[key]}


def alike(results: Iterable[Result], like: Result, apart_from: Sequence[str] = ()) -> list[Result]:
    """Results of this run's checkpoints with the same settings as `like`, but for those in `apart_from`."""
    wanted = settings_of(like)
    return [r for r in results if r.step_known and not set(differences(settings_of(r), wanted)) - set(apart_from)]


def find_headline(results: Sequence[Result], config: Config | None) -> Headline | None:
    """The result that represents a run; None if no checkpoint has one. `config` is None if it could not be read."""
    own = own_settings(config) if config is not None else {}
    end = own | ({name: value for name, value in config.evaluation.final.items() if name in own} if config else {})
    known = [result for result in results if result.step_known]
    if not known:
        return None

    def rank(result: Result, like: dict[str, Any]) -> tuple[Any, ...]:
        return not differences(settings_of(result), like), result.images_seen, result.plain, result.published

    newest = max(known, key=lambda r: rank(r, own))
    if end != own:
        at_end = max(known, key=lambda r: rank(r, end))
        if not differences(settings_of(at_end), end) and at_end.images_seen >= newest.images_seen:
            return Headline(at_end, {}, over_training=newest)
    return Headline(newest, differences(settings_of(newest), own), own_known=config is not None)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, (str, int)) else json.dumps(value)
