"""One official file: rows of 3 x size x size values, the planes R, G and B one after the other, and labels from 1 up.

Published as pickled dictionaries without an ending, and as `.npz`. `mean`, which the training batches hold too, is the mean
image: it is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.array_pickles import NUMBERS, PickledArray, unpickled
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.layout.names import shown
from tarflow.errors import why
from tarflow.files import read_up_to
from tarflow.npz import declared, read_npz
from tarflow.records import DamagedFileError

MOST_BYTES = 4 << 30  # of a file: a tenth of the training images at 64 pixels has 1.6 GB
SIDES = (64, 32, 16, 8)  # pixels: the sizes that were published
FIRST_LABEL = 1


def read_rows(path: Path, labelled: bool = True) -> tuple[NDArray[np.uint8], list[int] | None]:
    """(rows uint8 [n, 3 size size], labels as stored; None where there are none, or they are not wanted). Raises DataError."""
    found = _of_npz(path) if path.suffix == ".npz" else _of_pickle(path)
    rows, labels = found.get("data"), found.get("labels")
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2:
        raise DataError(f"{shown(path)} holds {_what(rows)} as `data`, not rows of uint8 pixels")
    side_of(rows.shape[1], path)
    if labels is None or not labelled:
        return rows, None
    values = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise DataError(f"{shown(path)} holds {_what(labels)} as `labels`, not a list of whole numbers")
    if len(values) != len(rows):
        raise DataError(f"{shown(path)} holds {len(rows):,} images but {len(values):,} labels")
    if values and min(values) < FIRST_LABEL:
        row = values.index(min(values))
        raise DataError(
            f"{shown(path)} holds the label {values[row]} (row {row}), and its classes are numbered from {FIRST_LABEL}: it is "
            "not the official file (--labels none takes its images without labels)"
        )
    return rows, values


def side_of(length: int, path: Path) -> int:
    """The size of the images of rows of this length, in pixels. Raises DataError for a length that no size has."""
    for side in SIDES:
        if length == 3 * side * side:
            return side
    known = ", ".join(f"{3 * side * side:,} (3 x {side} x {side})" for side in SIDES)
    raise DataError(f"{shown(path)} holds rows of {length:,} values; those of downsampled ImageNet have {known}")


def pixels_of(row: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A row -> uint8 [side, side, 3]."""
    return np.ascontiguousarray(row.reshape(3, side, side).transpose(1, 2, 0))


def _of_pickle(path: Path) -> dict[str, Any]:
    try:
        data = read_up_to(path, MOST_BYTES)
        if len(data) > MOST_BYTES:
            raise DataError(f"{shown(path)} has more than {MOST_BYTES:,} bytes, which no official file has")
        found = unpickled(data, NUMBERS)
    except OSError as error:
        raise DataError(f"cannot read {shown(path)}: {why(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {shown(path)} as a pickle of images: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{shown(path)} is a pickle of {_what(found)}, not of a dictionary with `data` and `labels`")
    named = {name: found[name] for name in ("data", "labels") if name in found}
    return {name: getattr(one, "array", None) if isinstance(one, PickledArray) else one for name, one in named.items()}


def _of_npz(path: Path) -> dict[str, Any]:
    try:
        return dict(read_npz(path, MOST_BYTES, {"data", "labels"} & {*declared(path, MOST_BYTES)}).arrays)
    except DamagedFileError as error:
        raise DataError(f"cannot read {shown(path)} as .npz: {error.problem}") from None
    except OSError as error:
        raise DataError(f"cannot read {shown(path)}: {why(error)}") from None


def _what(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return "nothing" if value is None else f"a value of type {type(value).__name__}"
