"""The configuration for sampling and evaluation: the run's, with the sampling settings that a sweep chose.

`tarflow sweep-guidance` writes its choice to RUN/sampling.json. It takes precedence over the run's own settings, and an
override on the command line takes precedence over it; every use of it is logged.
"""

import json
import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tarflow.errors import noted
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log, no_log
from tarflow.settings import first_reason
from tarflow.trainer.checkpoint.marker import Checkpoint, config_of
from tarflow.trainer.config.chosen_sampling import CHOSEN, chosen_sampling, save_choice
from tarflow.trainer.config.files import load_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import require_run


def choose(run_dir: Path, sampling: dict[str, Any], where: str) -> None:
    """Make sampling settings the run's default; `where`: the sweep that chose them."""
    save_choice(run_dir, sampling, where)


def run_config(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    log: Log = no_log,
    given: Container[str] = (),
) -> Config:
    """The configuration of a run with the sweep's choice, if there is one, and overrides.

    `given`: settings of the section sampling that were set by other options; they take precedence over the choice.
    """
    chosen, where = chosen_sampling(require_run(run_dir))
    overridden = {override.partition("=")[0] for override in overrides}
    used = {k: v for k, v in chosen.items() if f"sampling.{k}" not in overridden and k not in given}
    if used:
        listed = ", ".join(f"{key}={value}" for key, value in used.items())
        log(f"sampling with {listed}: chosen by {where} (remove {Path(run_dir) / CHOSEN} to undo)")
    ours = [f"sampling.{key}={json.dumps(value)}" for key, value in used.items()]
    try:
        return load_config(Path(run_dir) / "config.yaml", [*ours, *overrides])
    except TrainerError as error:
        if not used:
            raise
        load_config(Path(run_dir) / "config.yaml", overrides)  # where that fails as well, the choice is not to blame
        raise EvaluationError(
            f"{Path(run_dir) / CHOSEN} ({where} chose {listed}) does not go with {Path(run_dir) / 'config.yaml'}: {error}\n"
            f"Remove {CHOSEN}, or choose again: tarflow sweep-guidance"
        ) from None


TRAINED = ("noise", "noise_std", "noise_range", "label_dropout")  # settings that weights are bound to


def as_trained(config: Config, checkpoint: Checkpoint, log: Log = no_log) -> Config:
    """The configuration with the noise and the label dropout that a checkpoint was trained with, where a resume changed them.

    Raises EvaluationError where the run's settings do not go with those.
    """
    then = config_of(checkpoint).train
    changed = {name: (getattr(then, name), getattr(config.train, name)) for name in TRAINED}
    changed = {name: sides for name, sides in changed.items() if sides[0] != sides[1]}
    if not changed:
        return config
    listed = ", ".join(f"train.{name}={_plain(old)} (now {_plain(new)})" for name, (old, new) in changed.items())
    try:
        found = config.changed(train={name: old for name, (old, _) in changed.items()})
    except ValidationError as error:
        raise EvaluationError(f"{checkpoint.path} was trained with {listed}, and {first_reason(error)}") from None
    log(f"{checkpoint.name} was trained with {listed}: it is sampled and measured by that")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def shown_config(run_dir: Path, flaws: list[str], log: Log = no_log) -> tuple[Config | None, bool]:
    """(the configuration of a run for display; whether samples and evaluations are known to use it).

    None if config.yaml does not exist yet or cannot be read; problems are added to `flaws`.
    """
    config = None
    if not os.path.lexists(run_dir / "config.yaml"):
        return None, False
    with noted(flaws):
        config = load_config(run_dir / "config.yaml")
    if config is not None:
        with noted(flaws):
            return run_config(run_dir, log=log), True
    return config, False
