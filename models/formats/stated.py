"""Settings of an architecture that someone states (`--model`, config.json), held against what a file itself says."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from tarflow.image_size import parse_size
from tarflow.models.config import TarFlowConfig
from tarflow.models.errors import ModelError
from tarflow.models.presets import preset, preset_names
from tarflow.settings import one_if_equal

Stated = tuple[str, Mapping[str, Any]]  # who states, and what
_BETWEEN = re.compile(
    r",(?![^\[]*\])(?!\s*\d+\s*(?:,|$))"
)  # words; `image_size=256,384` and a list in brackets are one


def parse_model(text: str) -> dict[str, Any]:
    """`imagenet64-2-768-8-8`, `head_channels=32,layers_per_block=[4,4,24]`, or a preset with changes -> settings by name.

    Raises ModelError for an unknown preset or setting, with the nearest one, and for a value that is no number, list of
    numbers or bool, or not among the setting's words.
    """
    found: dict[str, Any] = {}
    for word in _BETWEEN.split(text):
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            if key not in preset_names():
                raise ModelError(f"--model {key!r} is neither a preset nor key=value; {_near(key, preset_names())}")
            found = preset(key).model_dump(mode="json") | found
            continue
        if key not in TarFlowConfig.model_fields:
            raise ModelError(
                f"--model {word}: the model has no setting {key!r}; {_near(key, list(TarFlowConfig.model_fields))}"
            )
        found[key] = _value(word, key, value)
    return found


def _value(word: str, key: str, text: str) -> Any:
    if key == "image_size":
        try:
            return parse_size(text.strip("[]"))
        except ValueError as error:
            raise ModelError(f"--model {word}: {error}") from None
    annotation = TarFlowConfig.model_fields[key].annotation
    if get_origin(annotation) is Literal:
        if text not in get_args(annotation):
            raise ModelError(f"--model {word}: {text[:80]!r} is not one of {', '.join(get_args(annotation))}")
        return text
    lists = annotation not in (int, float, bool)
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not all(isinstance(entry, int | float) for entry in (value if lists and isinstance(value, list) else [value])):
        also = ", nor a list of numbers" if lists else ", nor true or false"
        raise ModelError(f"--model {word}: {text[:80]!r} is not a number{also}")
    return value


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def together(stated: Sequence[Stated]) -> dict[str, Any]:
    """All that is stated. Raises ModelError, naming both sides, where one contradicts another."""
    found: dict[str, Any] = {}
    for number, (who, values) in enumerate(stated):
        for other, theirs in stated[:number]:
            _hold_against(f"{other} says", theirs, who, {key: values[key] for key in values if key in theirs})
        found |= values
    return found


def check_stated(config: TarFlowConfig, where: str, stated: Sequence[Stated]) -> None:
    """Raise ModelError, naming both sides, where something stated contradicts a configuration, said by `where`."""
    for who, values in stated:
        _hold_against(where, config.model_dump(mode="json"), who, values)


def _hold_against(where: str, known: Mapping[str, Any], who: str, values: Mapping[str, Any]) -> None:
    differ = [name for name, value in values.items() if _plain(name, known[name]) != _plain(name, value)]
    if differ:
        sides = "".join(
            f"\n  {name}: {_plain(name, values[name])!r} and {_plain(name, known[name])!r}" for name in differ
        )
        raise ModelError(f"{who} says another model than {where}:{sides}")


def _plain(name: str, value: Any) -> Any:
    """A value as it compares and is shown: JSON knows no tuples, and layers that are the same in all blocks are one number."""
    value = one_if_equal(value) if name == "layers_per_block" else value
    return list(value) if isinstance(value, tuple) else value
