"""The configuration that sampling and evaluation go by: the run's, with the sampling settings that a sweep chose.

`tarflow sweep-guidance` leaves its choice in RUN/sampling.json. It replaces the run's own settings, an override on the
command line replaces it, and whoever uses it says so.
"""

import json
import os
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from tarflow.errors import noted
from tarflow.trainer.config.chosen_sampling import CHOSEN, chosen_sampling, save_choice
from tarflow.trainer.config.files import load_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.run_dir import require_run


def choose(run_dir: Path, sampling: dict[str, Any], where: str) -> None:
    """Make sampling settings the run's default; `where` says which sweep chose them."""
    save_choice(run_dir, sampling, where)


def run_config(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
    given: Container[str] = (),
) -> Config:
    """The configuration of a run under the sweep's choice, if there is one, and overrides.

    `given`: settings of the section sampling that were asked for otherwise; the sweep's choice yields to them.
    """
    chosen, where = chosen_sampling(require_run(run_dir))
    overridden = {override.partition("=")[0] for override in overrides}
    used = {k: v for k, v in chosen.items() if f"sampling.{k}" not in overridden and k not in given}
    if used:
        listed = ", ".join(f"{key}={value}" for key, value in used.items())
        say(f"sampling with {listed}: chosen by {where} (remove {Path(run_dir) / CHOSEN} to undo)")
    ours = [f"sampling.{key}={json.dumps(value)}" for key, value in used.items()]
    return load_config(Path(run_dir) / "config.yaml", [*ours, *overrides])


def shown_config(
    run_dir: Path, flaws: list[str], say: Callable[[str], None] = lambda line: None
) -> tuple[Config | None, bool]:
    """(the configuration of a run for those who only show it; whether samples and evaluations are known to go by it).

    None if config.yaml is not there yet or cannot be read; what is wrong is added to `flaws`.
    """
    config = None
    if not os.path.lexists(run_dir / "config.yaml"):
        return None, False
    with noted(flaws):
        config = load_config(run_dir / "config.yaml")
    if config is not None:
        with noted(flaws):
            return run_config(run_dir, say=say), True
    return config, False
