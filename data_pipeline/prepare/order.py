"""Which images go to which split, and in which order they are written: functions of the seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline import keyed
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.prepare.source import ImageSource
from tarflow.data_pipeline.prepare.tables import WINDOW_BYTES

Mask = NDArray[np.bool_]


def split_masks(source: ImageSource, val_fraction: float, seed: int) -> dict[str, Mask]:
    """Split -> bool [n], which images are in it; '' where there is one set.

    The splits of the source are kept. A `val_fraction` takes a `val` out of its `train`, or out of all images; DataError if the
    source has a `val` already, or no `train` to take it from.
    """
    found = {name: np.isin(np.arange(len(source)), numbers) for name, numbers in source.splits.items()}
    everything = np.ones(len(source), dtype=bool)
    if not val_fraction:
        return found or {"": everything}
    if "val" in found or (found and "train" not in found):
        raise DataError(
            f"--val-fraction {val_fraction:g} splits a set, but the source has the splits {', '.join(found)} already: "
            "omit it, or take one with --split"
        )
    rest = found.pop("train", everything)
    numbers = np.flatnonzero(rest)
    val = np.zeros(len(source), dtype=bool)
    val[numbers] = held_out(source.labels[numbers], val_fraction, seed)
    return {"train": rest & ~val, "val": val, **found}


def held_out(labels: NDArray[np.int64], fraction: float, seed: int) -> Mask:
    """Bool [n]: the same share of every class (and of the unlabelled), chosen by the seed; at least one of each."""
    val = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(fraction * len(members))) if len(members) > 1 else 0
        val[members[keyed.permutation(keyed.key(seed, "held out", int(label)), len(members))[:count]]] = True
    return val


def shuffled(source: ImageSource, seed: int) -> NDArray[np.int64]:
    """The order of writing, int64 [n]: a permutation; where reading goes by runs, within windows of about 1 GiB."""
    runs = source.runs
    if runs is None or sum(size for _, size in runs) <= WINDOW_BYTES:
        return keyed.permutation(keyed.key(seed, "prepare"), len(source)).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum([rows for rows, _ in runs])])
    pieces: list[NDArray[np.int64]] = []
    for window in _windows(runs, keyed.permutation(keyed.key(seed, "prepare runs"), len(runs)).tolist()):
        together = np.concatenate([np.arange(starts[run], starts[run + 1]) for run in window])
        pieces.append(together[keyed.permutation(keyed.key(seed, "prepare", len(pieces)), len(together))])
    return np.concatenate(pieces)


def _windows(runs: list[tuple[int, int]], order: list[int]) -> list[list[int]]:
    """Runs in this order, grouped so that each group stays within WINDOW_BYTES (or is a single larger run)."""
    windows: list[list[int]] = []
    held = 0
    for run in order:
        if not windows or held + runs[run][1] > WINDOW_BYTES:
            windows.append([])
            held = 0
        windows[-1].append(run)
        held += runs[run][1]
    return windows
