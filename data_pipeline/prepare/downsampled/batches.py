"""The official files that lie in a folder, as one source: one file in memory at a time where all together are large."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.layout.names import shown
from tarflow.data_pipeline.layout.splits import ALL, chosen
from tarflow.data_pipeline.prepare.downsampled.rows import FIRST_LABEL, pixels_of, read_rows, side_of
from tarflow.data_pipeline.prepare.labels import number_labels
from tarflow.data_pipeline.prepare.source import Choices, ImageSource, files_note, split_note, split_numbers
from tarflow.data_pipeline.prepare.tables import WINDOW_BYTES

_NAME = re.compile(r"(?:train_data_batch_([1-9]\d{0,3})|val_data)(\.npz)?")


def is_official(path: Path) -> bool:
    """Whether a file is called as the official ones are."""
    return _NAME.fullmatch(path.name) is not None and path.is_file()


def downsampled_source(files: Sequence[Path], root: Path, choices: Choices) -> ImageSource:
    """The images of these files, whose names are official; `train` and `val` are splits. Raises DataError."""
    groups = _splits(files, root)
    wanted = chosen([*groups], choices.split, shown(root)) if choices.split or len(groups) > 1 else [*groups]
    splits = [*groups] if wanted == [ALL] else wanted
    reader = _Reader([path for split in splits for path in groups[split]], labelled=choices.labels != "none")
    parts = {path: rows for path, (rows, _) in zip(reader.files, reader.runs)}
    sizes = {split: sum(parts[path] for path in groups[split]) for split in splits}
    notes = [
        files_note(reader.files, root),
        f"images: rows of {3 * reader.side**2:,} values, the planes R, G, B of {reader.side} x {reader.side} pixels",
        *(split_note("file name", sizes) if len(sizes) > 1 else []),
    ]
    labels, classes = np.full(len(reader.labels), -1, dtype=np.int64), None
    if any(label is not None for label in reader.labels):
        values = [None if label is None else label - FIRST_LABEL for label in reader.labels]
        labels, classes, _ = number_labels(values, f"labels of {shown(root)}, less {FIRST_LABEL},")
        notes.append(
            f"labels: the files number classes from {FIRST_LABEL}, here they begin at 0; the order of the classes is that of "
            "their publisher, not of ILSVRC's folders (--classes FILE names them)"
        )
    return ImageSource(
        labels, classes, reader.read, reader.name, runs=reader.runs, pixels=True, splits=split_numbers(sizes, choices),
        notes=notes,
    )  # fmt: skip


def _splits(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """Split -> its files, training batches by their numbers. Raises DataError for a batch that is twice there, or missing."""
    train: dict[int, Path] = {}
    val: list[Path] = []
    for path in sorted(files):
        found = _NAME.fullmatch(path.name)
        if found is None:
            raise DataError(f"{shown(path)} is not called as the files of downsampled ImageNet are")
        other = train.get(int(found[1])) if found[1] else next(iter(val), None)
        if other is not None:
            raise DataError(
                f"{shown(root)} holds {other.name} and {path.name}, the same images twice: name one of them"
            )
        if found[1]:
            train[int(found[1])] = path
        else:
            val.append(path)
    numbers = sorted(train)
    if len(files) > 1 and (missing := sorted({*range(1, max(numbers, default=0) + 1)} - {*numbers})):
        raise DataError(
            f"{shown(root)} holds train_data_batch_{numbers[-1]} but not train_data_batch_{missing[0]}: put all of them there, "
            "or name a single file"
        )
    groups = {"train": [train[number] for number in numbers], "val": val}
    return {split: members for split, members in groups.items() if members}


class _Reader:
    """Reads single images, and keeps the files that were read last.

    `runs`: (images, bytes) of every file, in order.
    """

    def __init__(self, files: list[Path], labelled: bool) -> None:
        self.files, self.side = files, 0
        self.labels: list[int | None] = []
        self.runs: list[tuple[int, int]] = []
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()
        bare: list[Path] = []
        for number, path in enumerate(files):
            rows, labels = read_rows(path, labelled)
            side = side_of(rows.shape[1], path)
            if self.side not in (0, side):
                raise DataError(
                    f"{shown(path)} holds rows of {3 * side**2:,} values, and {shown(files[0])} of {3 * self.side**2:,}: "
                    "images of one size are prepared together"
                )
            self.side = side
            self.runs.append((len(rows), rows.nbytes))
            self.labels += [None] * len(rows) if labels is None else labels
            bare += [path] if labels is None and labelled else []
            self._keep(number, rows)
        if bare and len(bare) < len(files):
            raise DataError(f"{shown(bare[0])} has no labels, the others have: give --labels none")
        self.starts = np.concatenate([[0], np.cumsum([count for count, _ in self.runs])]).astype(np.int64)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Pixels uint8 [side, side, 3]; called from several threads. Raises BadSampleError where its file has changed."""
        number, row = self._locate(i)
        with self._lock:
            if number not in self._cache:
                try:
                    rows, _ = read_rows(self.files[number], labelled=False)
                except DataError as error:
                    raise BadSampleError("unreadable", str(error)) from None
                if (len(rows), rows.nbytes) != self.runs[number]:
                    raise BadSampleError("unreadable", f"{shown(self.files[number])} has changed while it was read")
                self._keep(number, rows)
            return pixels_of(self._cache[number][row], self.side)

    def name(self, i: int) -> str:
        """`FILE row N`, for messages."""
        number, row = self._locate(i)
        return f"{shown(self.files[number])} row {row}"

    def _keep(self, number: int, rows: NDArray[np.uint8]) -> None:
        # The shuffle works through windows of WINDOW_BYTES, so this much is asked for again and again.
        while self._cache and sum(self.runs[kept][1] for kept in self._cache) + rows.nbytes > 2 * WINDOW_BYTES:
            self._cache.pop(next(iter(self._cache)))
        self._cache[number] = rows

    def _locate(self, i: int) -> tuple[int, int]:
        """(file, row in it) of an image."""
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        return number, i - int(self.starts[number])
