"""Base class, types and bounds for the sections of the configuration; each room declares the sections it reads."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Tag, ValidationError


def _whole_number(value: Any) -> Any:
    """Accept a whole number written as 270000, 270_000, 27e4 or 256Ki."""
    if not isinstance(value, str):
        return value
    text = value.strip().replace("_", "")
    try:
        for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30)):
            if text.endswith(suffix):
                return int(text.removesuffix(suffix)) * factor
        if text.lstrip("+-").isdigit():
            return int(text)
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number != int(number):
        raise ValueError("it must be a whole number, such as 270000, 270_000, 27e4 or 256Ki")
    return int(number)


Count = Annotated[int, BeforeValidator(_whole_number)]


def first_reason(error: ValidationError) -> str:
    """What the first fault of a validation says, without pydantic's words around an error of ours."""
    first = error.errors()[0]
    return str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]


ValueT = TypeVar("ValueT")
ONE, LIST = "one", "list"
FORMS = (ONE, LIST)  # pydantic's errors have them in their path, below the setting


def form_of(value: Any) -> str:
    """The tag of a value that may be one or a list."""
    return LIST if isinstance(value, list | tuple) else ONE


# A value, or a list of such values. Told apart by their form, so that an error is about the one that was meant.
OneOrList = Annotated[Annotated[ValueT, Tag(ONE)] | Annotated[tuple[ValueT, ...], Tag(LIST)], Discriminator(form_of)]


def one_if_equal(value: Any) -> Any:
    """A list whose entries are all equal as that entry: one model is spelt in one way. Other values unchanged."""
    equal = isinstance(value, list | tuple) and len(value) > 0 and all(entry == value[0] for entry in value)
    return value[0] if equal else value


# Every number in every section has a lower and an upper bound, beyond anything useful and within what can be computed with:
# a typo is an error at once, not a failure later.
MOST_IMAGES = 10**15  # seen by a run; exact in a float64
MOST_IN_A_SET = 10**12  # images that an evaluation samples or reads
MOST_SECONDS = 30 * 86_400
MOST_SEED = 2**63 - 1
MOST_IN_A_PATH, MOST_IN_A_NAME = 4095, 255  # bytes


def at_home(value: Any) -> Any:
    """A path with a leading `~` expanded to the home directory; other values unchanged.

    Raises ValueError for a path that is longer than Linux allows: every use of it would fail, each in its own words.
    """
    if not isinstance(value, str | Path):
        return value
    path = os.path.expanduser(value)
    whole = os.fsencode(path)
    if len(whole) > MOST_IN_A_PATH or max(map(len, whole.split(b"/"))) > MOST_IN_A_NAME:
        raise ValueError(f"a path has at most {MOST_IN_A_PATH:,} bytes, {MOST_IN_A_NAME} between slashes")
    return path


HomePath = Annotated[Path, BeforeValidator(at_home)]


class Section(BaseModel):
    """A group of settings: unknown keys are errors, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
