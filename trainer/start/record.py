"""RUN/data.json: what a run was last started on. The names of its classes go on from there, and with each checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tarflow.files import listed, write_text
from tarflow.trainer.checkpoint.commit import MARKER, checkpoints_dir

NAME = "data.json"


def began(run_dir: Path) -> bool:
    """Whether a run has committed checkpoints, sound or not: work that must not be lost."""
    return bool(listed(checkpoints_dir(run_dir), f"*/{MARKER}"))


def write_record(run_dir: Path, record: Mapping[str, object]) -> None:
    """Replace what the run says of its data."""
    write_text(run_dir / NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_record(run_dir: Path) -> dict[str, Any]:
    """What a run says of its data; empty where it says nothing, or nothing readable."""
    try:
        record = json.loads((run_dir / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def recorded_classes(run_dir: Path) -> list[str] | None:
    """Names of the classes that a run was started on; None where it does not say."""
    names = read_record(run_dir).get("classes")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
