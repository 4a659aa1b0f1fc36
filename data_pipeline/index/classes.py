"""Class names of a data set: `classes.json`, a JSON list in label order."""

from __future__ import annotations

import json
from pathlib import Path

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.labels import MAX_CLASSES
from tarflow.data_pipeline.layout.names import class_names
from tarflow.records import read_bounded

CLASSES_FILE = "classes.json"
_MAX_BYTES = 256 << 20


def read_classes(root: Path) -> list[str] | None:
    """The class names in `root/classes.json`, or None without that file."""
    path = root / CLASSES_FILE
    return parse_classes(path) if path.is_file() else None


def parse_classes(path: Path) -> list[str]:
    """The class names in a JSON file, in label order. Raises DataError unless it holds a list of distinct names."""
    try:
        names = json.loads(read_bounded(path, _MAX_BYTES))
    except (OSError, ValueError, RecursionError) as err:
        raise DataError(f"cannot read class names from {path}: {err}: it must hold a JSON list of names") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path} must hold a list of class names")
    if len(names) > MAX_CLASSES:
        raise DataError(f"{path} holds {len(names)} class names, at most {MAX_CLASSES} are possible")
    return class_names(names, str(path))
