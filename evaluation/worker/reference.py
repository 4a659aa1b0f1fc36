"""Reference statistics: the features of a data set, computed once, with their provenance inside (contract 9).

The provenance says which data, how many images, which size, channels and crop, which feature network, weights and
preprocessing. Statistics of another provenance are refused, naming both values (case S04). Where the data lie is noted,
but a copy elsewhere is the same data: the fingerprint decides.

Any number of processes may compute them together: chunks of fixed size, merged in their order, so the bits do not depend
on who did what. Features of some images, spread evenly, are kept beside the sums for the scores that need them.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics
from tarflow.evaluation.shared_work import SharedWork
from tarflow.files import write_atomic

FORMAT = 2
CHUNK = 1024  # images
KEEP = 10_000  # images whose features are kept
Provenance = dict[str, str | int]
_WHERE = "data"  # the only entry that may differ


class Network(Protocol):
    """A feature network: see `features.Features`."""

    name: str
    sha256: str
    preprocessing: str
    dim: int

    def __call__(self, images: Tensor) -> Tensor: ...


class Images(Protocol):
    """Real images: see `data.ImageSet`."""

    @property
    def num_images(self) -> int: ...

    def provenance(self) -> Provenance: ...

    def batches(
        self, labelled: bool, batch_size: int = ..., part: int = ..., parts: int = ...
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]: ...


@dataclass
class Reference:
    """Statistics of the real images and where they come from; `rows` [m, d]: the features kept."""

    statistics: FeatureStatistics
    provenance: Provenance
    path: Path
    rows: Tensor


def full_provenance(data: Provenance, features: Network) -> Provenance:
    """Provenance of statistics: of the data (fingerprint, images, size, channels, crop) and of the network."""
    return {
        **data,
        "features": features.name,
        "features_sha256": features.sha256,
        "preprocessing": features.preprocessing,
    }


def cache_path(folder: Path, provenance: Provenance) -> Path:
    """`reference-<features>-<hash>.npz`: one file per provenance."""
    identity = {key: value for key, value in provenance.items() if key != _WHERE} | {"format": FORMAT}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"reference-{provenance['features']}-{digest}.npz"


def reference_statistics(
    path: Path,
    images: Images,
    features: Network,
    lease_s: float = 120.0,
    say: Callable[[str], None] = lambda line: None,
) -> Reference:
    """The statistics stored at `path`, or computed, with whoever else is at it, and stored there.

    A stored file of another provenance is an error, and so is a data set that yields another number of images.
    """
    provenance = full_provenance(images.provenance(), features)
    if not path.is_file():
        _compute(path, images, features, provenance, lease_s, say)
    return load_reference(path, provenance)


def _compute(
    path: Path, images: Images, features: Network, provenance: Provenance, lease_s: float, say: Callable[[str], None]
) -> None:
    total = images.num_images
    if total < 2:
        raise EvaluationError("reference statistics need at least 2 images: set evaluation.reference_images=0 for all")
    parts = -(-total // CHUNK)
    say(f"reference statistics of {total:,} images with {features.name}, once")
    # Named after what is computed, not after `path`: what a killed process left for other data must not be taken in.
    work = SharedWork(path.parent / "work" / cache_path(path, provenance).stem, {"chunks": parts}, lease_s)
    chunks = {f"reference-{k:05d}": k for k in range(parts)}

    def measure(name: str, temporary: Path) -> None:
        part, seen = chunks[name], 0
        first = part * total // parts
        statistics, kept = FeatureStatistics(features.dim), [torch.empty(0, features.dim)]
        for pixels, _, _ in images.batches(False, 64, part, parts):
            rows = features(pixels)
            statistics.add(rows)
            kept.append(rows[spread(first + seen + torch.arange(len(rows)), total, KEEP)])
            seen += len(rows)
        _write(temporary, statistics, torch.cat(kept), provenance)
        if parts > 1:
            say(f"  images {first:,} to {first + seen - 1:,} of {total:,}")

    def merge(name: str, temporary: Path) -> None:
        statistics, kept = FeatureStatistics(features.dim), []
        for chunk in chunks:
            part = load_reference(work.path(chunk), provenance)
            statistics.merge(part.statistics)
            kept.append(part.rows)
        _check_count(statistics.count, provenance)
        save_reference(path, statistics, provenance, torch.cat(kept))
        temporary.touch()

    if work.work_through(list(chunks), measure, path.is_file):
        try:
            work.work_through(["merged"], merge, path.is_file)
        except EvaluationError:
            work.remove()  # what the chunks hold is of no use
            raise
    work.remove()


def spread(positions: Tensor, total: int, keep: int) -> Tensor:
    """Which of `positions` are among `keep` spread evenly over 0..total-1: bool of the same shape."""
    if total <= keep:
        return torch.ones(len(positions), dtype=torch.bool)
    return (positions + 1) * keep // total > positions * keep // total


def _check_count(count: int, provenance: Provenance) -> None:
    announced = int(provenance["images"])
    lost = announced - count
    if lost < 0 or (lost and provenance.get("damaged images") != "left out"):
        raise EvaluationError(
            f"the reference has {count} images, {announced} were announced: the data set changed "
            "while it was read; write its index anew"
        )


def save_reference(path: Path, statistics: FeatureStatistics, provenance: Provenance, rows: Tensor) -> None:
    """Write count, mean, scatter matrix, kept features and provenance; the file appears whole or not at all."""
    write_atomic(path, lambda temporary: _write(temporary, statistics, rows, provenance))


def _write(path: Path, statistics: FeatureStatistics, rows: Tensor, provenance: Provenance) -> None:
    count, mean, scatter = statistics.parts()
    with open(path, "wb") as file:
        np.savez(
            file,
            format=np.int64(FORMAT),
            count=np.int64(count),
            mean=mean.numpy(),
            scatter=scatter.numpy(),
            rows=rows.numpy(),
            provenance=np.array(json.dumps(provenance, sort_keys=True)),
        )


def _read(path: Path) -> tuple[Provenance, FeatureStatistics, Tensor]:
    if not path.is_file():
        raise EvaluationError(f"no reference statistics at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            version = int(file["format"])
            if version == FORMAT:
                stored: Provenance = json.loads(str(file["provenance"]))
                statistics = FeatureStatistics.from_parts(int(file["count"]), file["mean"], file["scatter"])
                return stored, statistics, torch.from_numpy(file["rows"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"{path} is no file of reference statistics ({error}); remove it to have it made anew"
        ) from None
    raise EvaluationError(f"{path} has format {version}, this program reads {FORMAT}; remove it to have it made anew")


def load_reference(path: Path, expected: Provenance, keys: tuple[str, ...] = ()) -> Reference:
    """Read statistics; anything in their provenance that differs from `expected` is an error that names both values.

    `keys`: what must agree (default: everything but where the data lie).
    """
    stored, statistics, rows = _read(path)
    differ = [
        f"{key}: {stored.get(key)!r} in the file, {expected.get(key)!r} here"
        for key in keys or sorted((stored.keys() | expected.keys()) - {_WHERE})
        if stored.get(key) != expected.get(key)
    ]
    if differ:
        raise EvaluationError(
            f"the reference statistics at {path} were made from something else:\n  " + "\n  ".join(differ) + "\n"
            "give another file, or leave evaluation's reference path out to have them computed from data.train"
        )
    return Reference(statistics, stored, path, rows)
