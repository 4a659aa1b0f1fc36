"""What every kind of source provides: images by number, their labels, class names and splits, and how they were found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.layout.names import shown
from tarflow.data_pipeline.layout.splits import ALL


@dataclass
class ImageSource:
    """Images to prepare: `read(i)` gives a file (bytes) or pixels (uint8 [H, W, C]), `name(i)` is for messages.

    `labels`: int64 [n], -1 = no label. `named`: whether `classes` are the source's own names rather than numbers.
    `splits`: split -> numbers of its images, int64; empty where the source is one set. `runs`: (images, bytes) of ranges that
    are read as a whole, in order; None where any order of reading is cheap. `pixels`: whether `read` gives pixels. `notes`:
    what was inferred, a line each.
    """

    labels: NDArray[np.int64]
    classes: list[str] | None
    read: Callable[[int], bytes | NDArray[np.uint8]]
    name: Callable[[int], str]
    runs: list[tuple[int, int]] | None = None
    ignored: Counter[str] = field(default_factory=Counter)
    named: bool = False
    pixels: bool = False
    splits: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Choices:
    """The user's choices where a source can be read in several ways; None = found by name, and reported.

    `image_column`, `label_column`: columns or arrays. `labels`: where labels come from, one of `LABELS`. `split`: the
    splits to take, as in `layout.splits.asked_splits`.
    """

    image_column: str | None = None
    label_column: str | None = None
    labels: str | None = None
    split: str | None = None


LABELS = ("dataset.json", "folders", "parents", "none")


def asked_name(what: str, asked: str | None, names: Sequence[str], path: Path, flag: str) -> str | None:
    """`asked`, the column or array given with `flag`. Raises DataError for one that does not exist."""
    if asked is not None and asked not in names:
        raise DataError(f"{shown(path)} has no {what} {asked!r} ({flag}); it has {', '.join(map(shown, names))}")
    return asked


def first_of(known: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of the known names that exists."""
    return next((name for name in known if name in names), None)


def split_numbers(sizes: dict[str, int], choices: Choices) -> dict[str, NDArray[np.int64]]:
    """`splits` of a source whose splits follow each other, by their numbers of images; none for a single split."""
    if choices.split == ALL:
        return {}
    starts = np.concatenate([[0], np.cumsum(list(sizes.values()))])
    return {name: np.arange(a, b) for name, a, b in zip(sizes, starts, starts[1:])} if len(sizes) > 1 else {}


def split_note(how: str, sizes: dict[str, int]) -> list[str]:
    """The line about splits; none where no name mentions a split."""
    listed = ", ".join(f"{name} ({count:,} image{'s' * (count != 1)})" for name, count in sizes.items() if name)
    return [f"splits by {how}: {listed}"] if listed else []


def files_note(files: Sequence[Path], root: Path) -> str:
    """The line about the files that are read."""
    names = [
        shown(path.relative_to(root) if path.is_relative_to(root) and path != root else path.name) for path in files
    ]
    listed = ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, ..., {names[-1]}"
    return f"{len(names)} file{'s' * (len(names) > 1)} read: {listed}"
