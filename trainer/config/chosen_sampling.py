"""RUN/sampling.json: the sampling settings that `tarflow sweep-guidance` chose for a run, and by which sweep."""

import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from tarflow.models.sampling.settings import SamplingSettings
from tarflow.records import Record, load_record, save_record

CHOSEN = "sampling.json"


class Choice(Record):
    """It decides how a run is sampled, so a damaged one is an error and is never ignored."""

    what: ClassVar[str] = "a sweep's choice"
    way_out: ClassVar[str] = (
        "remove it to go by the run's own settings, or have `tarflow sweep-guidance` write it again from the sweep's record"
    )

    sampling: dict[str, Any]  # settings of the section sampling
    chosen_by: str = Field(max_length=1000)

    @field_validator("sampling")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        if unknown := set(value) - set(SamplingSettings.model_fields):
            raise ValueError(f"{sorted(unknown)[0]!r} is not a setting of the section sampling")
        SamplingSettings.model_validate_json(json.dumps(value), strict=True)  # there, a list is a tuple, too
        return value


def chosen_sampling(run_dir: Path) -> tuple[dict[str, Any], str]:
    """(settings of the section sampling, where they were chosen); ({}, "") without such a file.

    Raises DamagedFileError.
    """
    try:
        choice = load_record(run_dir / CHOSEN, Choice)
    except FileNotFoundError:
        return {}, ""
    return choice.sampling, choice.chosen_by


def save_choice(run_dir: Path, sampling: dict[str, Any], where: str) -> None:
    """Replace the choice; `where` names the sweep that made it."""
    save_record(run_dir / CHOSEN, Choice(sampling=sampling, chosen_by=where))
