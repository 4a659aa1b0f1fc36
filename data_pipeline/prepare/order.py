"""Which images go to which split, and in which order they are written: functions of the seed."""

from __future__ import annotations

import numpy as np

from tarflow.data_pipeline import keyed
from tarflow.data_pipeline.prepare.source import ImageSource
from tarflow.data_pipeline.prepare.tables import WINDOW_BYTES


def held_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Bool [n]: the same share of every class (and of the unlabelled), chosen by the seed; at least one of each."""
    val = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(fraction * len(members))) if len(members) > 1 else 0
        val[members[keyed.permutation(keyed.key(seed, "held out", int(label)), len(members))[:count]]] = True
    return val


def shuffled(source: ImageSource, seed: int) -> np.ndarray:
    """The order of writing, int64 [n]: a permutation; where reading goes by runs, within windows of about 1 GiB."""
    runs = source.runs
    if runs is None or sum(size for _, size in runs) <= WINDOW_BYTES:
        return keyed.permutation(keyed.key(seed, "prepare"), len(source)).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum([rows for rows, _ in runs])])
    pieces: list[np.ndarray] = []
    window: list[np.ndarray] = []
    held = 0
    for run in [*keyed.permutation(keyed.key(seed, "prepare runs"), len(runs)).tolist(), None]:
        if window and (run is None or held + runs[run][1] > WINDOW_BYTES):
            together = np.concatenate(window)
            pieces.append(together[keyed.permutation(keyed.key(seed, "prepare", len(pieces)), len(together))])
            window, held = [], 0
        if run is not None:
            window.append(np.arange(starts[run], starts[run + 1]))
            held += runs[run][1]
    return np.concatenate(pieces)
