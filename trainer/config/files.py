"""Configuration files: YAML plus `section.key=value` overrides -> a checked `Config`, and back.

YAML's own guesses about scalars are not used (it reads 1e-4 as text, 010 as eight and 12:30:00 as 45000: case K01):
every scalar is text until the field's type converts it.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError

NULLS = {"", "~", "null", "Null", "NULL"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply overrides; any fault is a `TrainerError` that names file, key and value."""
    path = Path(path)
    if not path.is_file():
        raise TrainerError(f"no configuration file at {path}")
    try:
        tree = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainerError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(tree, dict):
        raise TrainerError(f"{path} must hold sections (data:, model:, train:, ...), not {type(tree).__name__}")
    return build_config(tree, str(path), overrides)


def build_config(tree: dict[str, Any], source: str, overrides: Sequence[str]) -> Config:
    """A `Config` from nested mappings, which are changed in place, and overrides; `source` appears in errors."""
    origin: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or "." not in key:
            raise TrainerError(f"override {override!r} must have the form section.key=value")
        origin[key] = f"override {override!r}"
        try:
            _assign(tree, key.split("."), yaml.load(value, Loader=yaml.BaseLoader))
        except yaml.YAMLError:
            raise TrainerError(f"the value of override {override!r} is not readable") from None
    return parse_config(tree, source, origin)


def _assign(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        child = tree.get(key)
        tree[key] = child = child if isinstance(child, dict) else {}
        tree = child
    tree[keys[-1]] = value


def parse_config(tree: Mapping[str, Any], source: str, origin: Mapping[str, str] | None = None) -> Config:
    """A `Config` from nested mappings; `source` and `origin` (key -> where it was set) appear in errors."""
    try:
        return Config.model_validate(_nulls(tree))
    except ValidationError as error:
        lines = [_explain(item, source, origin or {}) for item in error.errors()]
        raise TrainerError("\n".join(dict.fromkeys(lines))) from None


def _nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _nulls(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nulls(v) for v in value]
    return None if isinstance(value, str) and value in NULLS else value


def _explain(item: Any, source: str, origin: Mapping[str, str]) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    within = [text for k, text in origin.items() if k.startswith(f"{key}.")]  # a section that only an override has
    where = origin.get(key) or (within[0] if within and key not in Config.model_fields else source)
    if item["type"] == "extra_forbidden":
        known = _fields(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"known: {', '.join(known)}"
        return f"{where}: unknown setting {key}; {hint}"
    if item["type"] == "missing":
        return f"{where}: setting {key} is required"
    message = item["msg"].removeprefix("Value error, ")
    if not path or isinstance(item.get("input"), Mapping):
        return f"{where}: {message}"
    return f"{where}: {key}={item['input']!r}: {message[0].lower()}{message[1:]}"


def _fields(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Config
    for name in path:
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def config_tree(config: Config) -> dict[str, dict[str, Any]]:
    """The resolved configuration as plain nested values (paths as text)."""
    return config.model_dump(mode="json")


def config_text(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config_tree(config), sort_keys=False, default_flow_style=None, width=120)


def config_hash(config: Config) -> str:
    """Short digest of the resolved configuration."""
    return hashlib.sha256(json.dumps(config_tree(config), sort_keys=True).encode()).hexdigest()[:16]


def config_diff(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: "section.key" -> (old, new)."""
    a, b = config_tree(old), config_tree(new)
    return {
        f"{section}.{key}": (a[section].get(key), value)
        for section, values in b.items()
        for key, value in values.items()
        if a[section].get(key) != value
    }
