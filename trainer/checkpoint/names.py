"""Names of checkpoints: by images seen, which only ever grow. Those of version 0.1, by steps, are still read."""

import re
from pathlib import Path

# Endings of names: being written, replaced by a save at the same images, set aside at a start, set aside by a person.
TEMPORARY, REPLACED, DAMAGED, ASIDE = ".tmp", ".replaced", ".damaged", ".aside"
_NAME = re.compile(r"(?:images-\d{12,}|step-\d{8,})")
_LEADING = re.compile(rf"({_NAME.pattern})(?:[-.].*)?")


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run's checkpoints are."""
    return run_dir / "checkpoints"


def checkpoint_name(images_seen: int) -> str:
    """Name of the checkpoint at N images seen; names sort as the numbers do."""
    return f"images-{images_seen:012d}"


def is_checkpoint_name(name: str) -> bool:
    """Whether a directory of this name is meant to be a checkpoint, committed or not."""
    return _NAME.fullmatch(name) is not None


def leading_name(text: str) -> str:
    """The checkpoint name that `text` begins with, as the names of results and pins do; empty if there is none."""
    found = _LEADING.fullmatch(text)
    return found[1] if found else ""


def parse_name(name: str) -> tuple[str, int]:
    """The counter that a checkpoint is named by, and its value: ("images_seen", N), or ("step", N) of version 0.1."""
    kind, _, number = name.partition("-")
    return ("images_seen" if kind == "images" else "step"), int(number)
