"""What a command's folder may hold already: its own unfinished work, its very result, or nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tarflow.evaluation.errors import EvaluationError
from tarflow.files import listed
from tarflow.terminal import plain


def refuse_other_files(out: Path, *own: str) -> None:
    """Raise EvaluationError for a folder with anything but what a command leaves, or left unfinished in `work`.

    `own`: what the names of its files begin with. A link in their place is refused, too, before anything is computed.
    """
    there = listed(out) if out.is_dir() else []
    for path in there:
        if path.is_symlink():
            raise EvaluationError(f"--out {path}: it is a link, and nothing is written through one: give a new folder")
    names = [path.name for path in there]
    if others := [name for name in names if name != "work" and not name.startswith((".", *own))]:
        raise EvaluationError(f"--out {out} holds other files ({others[0]}, ...): give a new folder")


def refuse_others(out: Path, what: str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise EvaluationError that names both sides where a stored result is not the one that is asked for."""
    wanted: dict[str, Any] = json.loads(json.dumps(asked))  # as JSON stores it: a tuple comes back as a list
    differ = [
        f"{key}: {plain(repr(stored.get(key)))} there, {plain(repr(value))} asked"
        for key, value in wanted.items()
        if stored.get(key) != value
    ]
    if differ:
        raise EvaluationError(f"--out {out} holds other {what} ({'; '.join(differ)}): give another folder")
