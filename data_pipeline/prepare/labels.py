"""Labels as sources hold them - numbers, names, one-hot rows - as class numbers and class names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.labels import MAX_CLASSES, label_gaps
from tarflow.data_pipeline.layout.names import class_names, normal, only_case, shown


def number_labels(values: Sequence[Any], where: str) -> tuple[NDArray[np.int64], list[str], bool]:
    """(int64 [n] with -1 = no label, class names, whether the names are the source's own). None = no label.

    Integers keep their value and are named by it. Names are numbered in sorted order; where all of them are numbers, in
    the order of these, so that "10" comes after "9".
    """
    present = [value for value in values if value is not None]
    if all(isinstance(value, int) and not isinstance(value, bool) for value in present):
        if present and min(present) < 0:
            raise DataError(f"{where} holds the label {min(present)} (row {values.index(min(present))}): must be >= 0")
        count = max(present, default=-1) + 1
        if count > MAX_CLASSES:
            raise DataError(
                f"{where} holds the label {count - 1} (row {values.index(count - 1)}): integers must number the classes from 0 "
                f"to at most {MAX_CLASSES - 1}"
            )
        return np.array([-1 if value is None else value for value in values]), [str(i) for i in range(count)], False
    if not all(isinstance(value, str) for value in present):
        odd = [value for value in present if not isinstance(value, (int, str)) or isinstance(value, bool)]
        if odd:
            raise DataError(f"{where} holds {repr(odd[0])[:80]}, expected integers or names")
        number, name = (next(value for value in present if isinstance(value, kind)) for kind in (int, str))
        raise DataError(
            f"{where} holds numbers ({number}) and names ({repr(name)[:80]}): labels must be all of one kind"
        )
    found = sorted(set(present))
    if all(name.isascii() and name.isdigit() for name in found):
        found.sort(key=lambda name: (int(name), name))
    classes = class_names(found, where)
    numbers = {name: number for number, name in enumerate(found)}
    return np.array([-1 if value is None else numbers[value] for value in values]), classes, True


def named_integers(values: Sequence[Any], names: list[str], where: str) -> NDArray[np.int64]:
    """int64 [n] of integers whose names the source lists. None and -1 = no label, as `ClassLabel` has it."""
    odd = next((value for value in values if not (value is None or isinstance(value, int))), None)
    if odd is not None:
        raise DataError(f"{where} holds {repr(odd)[:80]}, expected the numbers of its {len(names)} names")
    labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
    wrong = np.flatnonzero((labels < -1) | (labels >= len(names)))
    if len(wrong):
        raise DataError(
            f"{where} holds the label {labels[wrong[0]]} (row {wrong[0]}), its names end at {len(names) - 1}"
        )
    return labels


def array_labels(raw: NDArray[Any], where: str) -> tuple[list[Any], str | None]:
    """(one value per row, a note) for an array [n], [n, 1] or one-hot [n, classes]. Raises DataError for anything else."""
    if raw.ndim == 1 or (raw.ndim == 2 and raw.shape[1] == 1):
        return raw.reshape(-1).tolist(), None
    if raw.ndim == 2 and raw.dtype.kind in "buif" and np.isin(raw, (0, 1)).all() and (raw.sum(axis=1) == 1).all():
        return raw.argmax(axis=1).tolist(), f"{where} is one-hot: the label is the position of the 1"
    raise DataError(f"{where} has shape {list(raw.shape)}: labels are [n], [n, 1] or one-hot rows (--label-column)")


def by_list(
    labels: NDArray[np.int64], classes: list[str], named: bool, wanted: list[str], where: str
) -> NDArray[np.int64]:
    """Labels int64 [n] renumbered by the list `wanted` (`--classes`): by name where the source has names, else unchanged.

    Raises DataError for a class that the list lacks.
    """
    if not named:
        if labels.max(initial=-1) >= len(wanted):
            raise DataError(f"{where} holds the label {labels.max()}, --classes lists {len(wanted)} names")
        return labels
    numbers = {normal(name): number for number, name in enumerate(wanted)}
    used = np.unique(labels[labels >= 0]).tolist()
    missing = [classes[label] for label in used if classes[label] not in numbers]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"{where} has classes that --classes does not list: {', '.join(map(shown, missing[:5]))}{more}; it lists "
            f"{', '.join(map(shown, wanted[:5]))}{' ...' if len(wanted) > 5 else ''}"
        )
    table = np.array([numbers.get(name, -1) for name in classes] + [-1])
    return np.asarray(table[labels], dtype=np.int64)


def label_notes(labels: NDArray[np.int64], classes: list[str] | None, named: bool) -> list[str]:
    """What is odd about the labels: images without any, classes without images, names that only differ in case."""
    notes = []
    missing = int((labels < 0).sum())
    if classes and missing:
        notes.append(f"{missing} of {len(labels)} images have no label")
    if classes and (gaps := label_gaps(np.unique(labels[labels >= 0]).tolist(), len(classes))):
        notes.append(gaps)
    if classes and named and (alike := only_case(classes)):
        notes.append(alike)
    return notes
