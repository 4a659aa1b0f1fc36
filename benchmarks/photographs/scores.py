"""A run's figures by the product's evaluation, and the difference of two runs with its standard error.

Held-out tiles of one photograph are alike, so an error bar that took them for independent would be too small: the error of bits
per dimension takes photographs as the independent units (a cluster-robust standard error).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.photographs.tiles import photograph_of
from benchmarks.verbs import VerbFailedError, run_verb
from tarflow.evaluation.metrics.names import is_distance
from tarflow.evaluation.results import read_results
from tarflow.evaluation.worker.follow import WorkerOptions, waiting

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """What one evaluated checkpoint shows. Errors are standard errors; `neighbour_rms` is a median in grey levels."""

    images: int
    samples: int
    distance: float | None
    distance_stderr: float | None
    neighbour_rms: float | None
    folder: str


def evaluate(run: Path, reference: Path) -> list[Score]:
    """Evaluate every checkpoint that has no result yet; all results, by images seen and number of samples.

    A result without a distance (too many of its samples are not finite) is one, too: what it says is printed.
    """
    try:
        run_verb(["evaluate", run, "--once", "--reference", reference], run.with_name(f"{run.name}.log"))
    except VerbFailedError:
        if any(names for _, names in waiting(run, WorkerOptions())):  # it failed for another reason
            raise
        problems = [f"{folder.name}: {result['problem']}" for folder, result in read_results(run) if result["problem"]]
        print("\n".join(problems), flush=True)
    scores = [score_of(folder, result) for folder, result in read_results(run)]
    return sorted(scores, key=lambda score: (score.images, score.samples))


def score_of(folder: Path, result: Mapping[str, Any]) -> Score:
    """The figures of a result.json that the tables show."""
    distance = next((result[name] for name in result if is_distance(name)), None)
    neighbours = result.get("neighbours") or {}
    return Score(
        result["images_seen"], result["num_samples"], distance, result.get("distance_stderr"),
        neighbours.get("nearest_rms_median"), str(folder),
    )  # fmt: skip


def bits_of(run: Path, tiles: Path, out: Path, num: int, draws: int) -> dict[str, float]:
    """Bits per dimension of held-out tiles by their names, `num` of them (0: all), measured once. Labels are not given."""
    import pyarrow.parquet as pq

    if not (out / "likelihood.parquet").is_file():  # the folder alone may be a measurement that was interrupted
        words = ["likelihood", run, tiles, "--out", out, "--num", num, "--draws", draws, "--labels", "none"]
        run_verb(words, run.with_name(f"{run.name}.log"))
    table = pq.read_table(out / "likelihood.parquet")
    return dict(zip(table["name"].to_pylist(), table["bits_per_dim"].to_pylist()))


def clustered(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    """The mean and its standard error, with whole clusters as the independent units.

    Linearised ratio of sums: se^2 = G / (G - 1) sum_g (sum_{i in g} (v_i - mean))^2 / n^2, with G clusters and n values.
    """
    data: Floats = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, weights=data - mean)
    if len(sums) < 2:
        return mean, float("nan")
    return mean, float(np.sqrt(len(sums) / (len(sums) - 1) * np.sum(sums**2)) / len(data))


def mean_bits(bits: Mapping[str, float]) -> tuple[float, float]:
    """Mean bits per dimension over tiles, and its standard error over photographs."""
    return clustered(list(bits.values()), [photograph_of(name) for name in bits])


def difference(bits: Mapping[str, float], base: Mapping[str, float]) -> tuple[float, float]:
    """Mean of `bits - base` tile by tile, and its standard error over photographs. Raises ValueError for other tiles."""
    if bits.keys() != base.keys():
        raise ValueError(f"{len(bits.keys() ^ base.keys())} tiles were measured in one of the two only")
    return mean_bits({name: value - base[name] for name, value in bits.items()})
