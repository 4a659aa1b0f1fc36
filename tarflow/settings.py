"""The ground of every section of the configuration. Each room declares the sections that it reads itself."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _whole_number(value: Any) -> Any:
    """Let a count be written as 270000, 270_000, 27e4 or 256Ki: whatever it is, it must be whole."""
    if not isinstance(value, str):
        return value
    text = value.strip().replace("_", "")
    for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30)):
        if text.endswith(suffix):
            return int(text.removesuffix(suffix)) * factor
    number = float(text)
    return int(text) if text.lstrip("+-").isdigit() else (int(number) if number == int(number) else value)


Count = Annotated[int, BeforeValidator(_whole_number)]


def at_home(value: Any) -> Any:
    """A path with the home directory in place of a leading `~`; whatever else is given as it is."""
    return os.path.expanduser(value) if isinstance(value, str | Path) else value


HomePath = Annotated[Path, BeforeValidator(at_home)]


class Section(BaseModel):
    """A group of settings: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
