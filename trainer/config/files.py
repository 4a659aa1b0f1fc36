"""Configuration files: YAML plus `section.key=value` overrides -> a validated `Config`, and back."""

import copy
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tarflow.trainer.config.explain import NOT_A_SECTION, explain, shown, without_section
from tarflow.trainer.config.plain_yaml import parse_yaml
from tarflow.trainer.config.schema import Config
from tarflow.trainer.config.source import NULLS, read_tree
from tarflow.trainer.errors import TrainerError

MOST_FAULTS = 20  # listed in one error


def load_config(path: str | Path, overrides: Sequence[str] = (), *, own: bool = False) -> Config:
    """Read a configuration file with its bases and apply overrides.

    `own`: whoever runs the program has given this file as the configuration to run. Only then may the functions that it names
    (`data.dataset`, `data.transform`) be imported; those that overrides name always may.

    Raises:
        TrainerError: it names the file, the setting and the value.

    """
    tree, origin = read_tree(Path(path))
    config = build_config(tree, str(path), overrides, origin)
    if own:
        config.data.allow_code()
    return config


def build_config(
    tree: Mapping[str, Any], source: str, overrides: Sequence[str], origin: Mapping[str, str] | None = None
) -> Config:
    """A `Config` from nested mappings and overrides; the last of several overrides of a setting wins.

    `source` and `origin` (key -> where it was set, if not in `source`) appear in errors.
    """
    whole = copy.deepcopy(dict(tree))
    origin = dict(origin or {})
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or "." not in key:
            raise TrainerError(without_section(override))
        origin[key] = f"override {shown(override)}"
        _assign(whole, key.split("."), parse_yaml(value, f"the value of {origin[key]}"), f"{source} with {origin[key]}")
    config = parse_config(whole, source, origin)
    given = {override.partition("=")[0] for override in overrides}
    for setting in ("dataset", "transform"):
        if f"data.{setting}" in given:
            config.data.allow_code(setting)
    return config


def _assign(tree: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    for level, key in enumerate(keys[:-1], start=1):
        child = _nulls(tree.get(key))
        if child is not None and not isinstance(child, dict):
            raise TrainerError(f"{where}: {'.'.join(keys[:level])}={shown(child)}: {NOT_A_SECTION}")
        # Copied: an alias may stand for the same section elsewhere.
        tree[key] = child = dict(child or {})
        tree = child
    tree[keys[-1]] = value


def parse_config(tree: Mapping[str, Any], source: str, origin: Mapping[str, str] | None = None) -> Config:
    """A `Config` from nested mappings; `source` and `origin` (key -> where it was set) appear in errors."""
    try:
        # An empty section (all commented out, say) means its defaults.
        return Config.model_validate({k: {} if v is None else v for k, v in _nulls(tree).items()})
    except ValidationError as error:
        faults = error.errors()
        lines = dict.fromkeys(explain(item, source, origin or {}) for item in faults[:MOST_FAULTS])
        more = [f"and {len(faults) - MOST_FAULTS:,} more"] if len(faults) > MOST_FAULTS else []
        raise TrainerError("\n".join([*lines, *more])) from None


def _nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _nulls(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nulls(v) for v in value]
    return None if isinstance(value, str) and value in NULLS else value


def config_tree(config: Config) -> dict[str, dict[str, Any]]:
    """The resolved configuration as plain nested values (paths as text)."""
    return config.model_dump(mode="json")


def config_text(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config_tree(config), sort_keys=False, default_flow_style=None, width=120)


def sealed_text(config: Config) -> str:
    """The same below a line with its checksum, to detect damage when it is read again."""
    text = config_text(config)
    return f"# checksum {zlib.crc32(text.encode()):08x} of the lines below; remove this line when you edit them\n{text}"


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
