"""RUN/sampling.json: the sampling settings that `tarflow sweep-guidance` chose for a run, and which sweep it was."""

import json
from pathlib import Path
from typing import Any

from tarflow.models.sampling.settings import SamplingSettings
from tarflow.trainer.errors import TrainerError

CHOSEN = "sampling.json"


def chosen_sampling(run_dir: Path) -> tuple[dict[str, Any], str]:
    """(settings of the section sampling, where they were chosen); nothing without such a file."""
    path = run_dir / CHOSEN
    try:
        stored = json.loads(path.read_text())
        chosen, where = dict(stored["sampling"]), str(stored["chosen_by"])
    except FileNotFoundError:
        return {}, ""
    except (ValueError, KeyError, TypeError):
        raise TrainerError(f"{path} is not readable; remove it to go by the run's own settings") from None
    if unknown := set(chosen) - set(SamplingSettings.model_fields):
        raise TrainerError(f"{path} holds {sorted(unknown)[0]!r}, which is no setting of the section sampling")
    return chosen, where
