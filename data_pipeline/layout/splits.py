"""Splits recognized by name: `train-00000.parquet` beside `test-00000.parquet`, `set-train-0000.tar`, folders train/ and val/.

A publisher's folder often holds several splits. Mixed together, metrics on held-out images would be metrics on training
images, so several splits are never taken as one data set unless asked for (`--split all`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tarflow.data_pipeline.errors import DataError

ALL = "all"
_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "t10k"),
}
SPLITS: tuple[str, ...] = tuple(_NAMES)
_CANONICAL = {name: split for split, names in _NAMES.items() for name in names}


def split_named(word: str) -> str | None:
    """`train`, `val` or `test` for a word that means it, in upper or lower case; else None."""
    return _CANONICAL.get(word.lower())


def split_of(relative: Path) -> str | None:
    """The split that a path names, by a separate word (`imagenet1k-train-0000.tar`); the last part that names one counts.

    None where no part names one, and where one part names two.
    """
    for part in reversed(relative.parts):
        words = set(re.split(r"[^a-z0-9]+", part.lower())) | set(re.split(r"[^a-z]+", part.lower()))
        named = {_CANONICAL[word] for word in words if word in _CANONICAL}
        if named:
            return named.pop() if len(named) == 1 else None
    return None


def by_split(paths: Iterable[Path], root: Path) -> dict[str, list[Path]]:
    """Split -> its paths, in the order train, val, test, ''; '' holds what names none. Folders above `root` do not count."""
    found: dict[str, list[Path]] = {name: [] for name in (*SPLITS, "")}
    for path in paths:
        relative = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        found[split_of(relative) or ""].append(path)
    return {name: members for name, members in found.items() if members}


def asked_splits(text: str) -> list[str]:
    """The splits of `--split NAME[,NAME]`. Raises DataError for a word that is not a split."""
    words = [word.strip() for word in text.split(",")]
    named = [ALL if word == ALL else split_named(word) for word in words]
    if None in named or (ALL in named and len(named) > 1) or len(set(named)) < len(named):
        known = ", ".join(name for names in _NAMES.values() for name in names)
        raise DataError(f"--split {text!r} names no splits: give one or several of {known}, or {ALL}")
    return [name for name in named if name is not None]


def chosen(found: Sequence[str], asked: str | None, where: str) -> list[str]:
    """The splits to take of those that were found: those asked for, otherwise all. `where`: for the message.

    Raises DataError for a split that is not there, and for members that name no split beside others that do.
    """
    if asked is not None:
        wanted = asked_splits(asked)
        for name in wanted:
            if name not in found and name != ALL:
                have = ", ".join(split for split in found if split) or "none"
                raise DataError(f"{where} holds no split {name!r} (--split {asked}); by name it holds: {have}")
        return wanted
    if len(found) > 1 and "" in found:
        named = ", ".join(split for split in found if split)
        raise DataError(
            f"{where}: some of it names a split ({named}) and some does not: take one with --split {found[0]}, or all as "
            f"one set with --split {ALL}"
        )
    return list(found)
