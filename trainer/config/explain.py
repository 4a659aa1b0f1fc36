"""Error messages for wrong settings, a line each: where it was set, its name and value, and the nearest valid one."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tarflow.settings import FORMS
from tarflow.trainer.config.schema import Config

NOT_A_SECTION = "a section holds settings (name: value)"
_WRONG_FORM = {
    "model_type": NOT_A_SECTION,
    "tuple_type": "it must be a list, in brackets and with commas",
}


def explain(item: Any, source: str, origin: Mapping[str, str]) -> str:
    """The message for one of pydantic's errors. `source`: the file; `origin`: key -> the override or base that set it."""
    path = [str(part)[:100] for part in item["loc"] if part not in FORMS]
    key = ".".join(path)
    where = _where(key, source, origin)
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown setting {key}; {_instead(path)}"
    if item["type"] == "missing":
        return f"{where}: setting {key} is required"
    if item["type"] in _WRONG_FORM:
        return f"{where}: {key}={shown(item['input'])}: {_WRONG_FORM[item['type']]}"
    ours = item["type"] == "value_error"  # raised by a validator of a section
    message = str(item["ctx"]["error"]) if ours else item["msg"]
    if not path or (ours and isinstance(item.get("input"), Mapping)):
        return f"{where}: {message}"
    return (
        f"{where}: {key}={shown(item['input'])}: {message[0].lower()}{message[1:]}{_near_choice(path, item['input'])}"
    )


def without_section(override: str) -> str:
    """The message for an override that is not of the form `section.key=value`."""
    key, equals, value = override.partition("=")
    meant = " or ".join(f"{name}={value}" if equals else f"{name}=VALUE" for name in _sections_with(key))
    form = f"override {shown(override)} must have the form section.key=value"
    return f"{form}: did you mean {meant}?" if meant else form


def _where(key: str, source: str, origin: Mapping[str, str]) -> str:
    """What set `key` or a mapping around it; otherwise the file, with what set parts of `key`."""
    set_by = [text for k, text in origin.items() if k == key or key.startswith(f"{k}.")]
    if set_by:
        return set_by[0]
    parts = ", ".join(dict.fromkeys(text for k, text in origin.items() if not key or k.startswith(f"{key}.")))
    if parts and key and key not in Config.model_fields:  # `trian.seed=4`: the file need not have such a section
        return parts
    return f"{source} with {parts}" if parts else source


def _instead(path: Sequence[str]) -> str:
    """A suggestion for an unknown setting: a similar name in its section, or the same name in another section."""
    *parents, name = path
    section, dot, rest = name.partition(".")
    if dot and not parents and rest in _names([section]):
        return f"write {rest} inside the section {section}"
    known = _names(parents)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7) or [
        key for key in _sections_with(name) if name not in known
    ]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:
        return f"known: {', '.join(known)}"
    return f"did you mean {' or '.join(k if '.' in k else '.'.join([*parents, k]) for k in near)}?"


def _sections_with(name: str) -> list[str]:
    """`section.name` for each section that has such a setting, or a similar one."""
    every = {section: _names([section]) for section in Config.model_fields}
    same = [f"{section}.{name}" for section, names in every.items() if name in names]
    if same:
        return same
    near = difflib.get_close_matches(name, {n for names in every.values() for n in names}, n=1, cutoff=0.8)
    return [f"{section}.{key}" for key in near for section, names in every.items() if key in names]


def _names(path: Sequence[str]) -> list[str]:
    """Settings of a section; for an empty path, the sections."""
    fields = _fields(path)
    return [*fields, "preset"] if list(path) == ["model"] else list(fields)


def _fields(path: Sequence[str]) -> dict[str, FieldInfo]:
    model: type[BaseModel] = Config
    for name in path:
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return {}
        model = annotation
    return dict(model.model_fields)


def _near_choice(path: Sequence[str], value: Any) -> str:
    """A suggestion for a setting that must be one of a few words."""
    field = _fields(path[:-1]).get(path[-1])
    if field is None or get_origin(field.annotation) is not Literal:
        return ""
    near = difflib.get_close_matches(str(value), get_args(field.annotation), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def shown(value: Any) -> str:
    """A value as it was given, cut to its first characters: it may be a whole document."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text):,} characters)"
