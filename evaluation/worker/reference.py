"""Reference statistics: the features of a data set, computed once, with their provenance inside (contract 9).

The provenance says which data, how many images, which size, channels and crop, which feature network, weights and
preprocessing. Statistics of another provenance are refused, naming both values (case S04). Where the data lie is noted,
but a copy elsewhere is the same data: the fingerprint decides.

Any number of processes may compute them together: chunks of fixed size, merged in their order, so the bits do not depend
on who did what. Features of some images, spread evenly, are kept beside the sums for the scores that need them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tarflow.data_pipeline.images.identical import image_hashes
from tarflow.errors import UserError
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics
from tarflow.evaluation.shared_work import SharedWork
from tarflow.files import check_writable, write_atomic
from tarflow.npz import write_npz
from tarflow.records import DamagedFileError
from tarflow.trainer.config.reference_file import FORMAT, ReferenceFile, read_reference

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
    hashes: np.ndarray | None = None  # uint64 [images], of the pixels; not in files of version 0.1
    checked: bool = True  # False: a file without a checksum

    def describe(self) -> dict[str, Any]:
        """What a result says of them; `checked` is false if their file carries no checksum."""
        return self.provenance | ({} if self.checked else {"checked": False})


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
    ours: bool = True,
) -> Reference:
    """The statistics stored at `path`, or computed, with whoever else is at it, and stored there.

    A stored file of another provenance is an error, and so is a data set that yields another number of images. A damaged
    one is made anew where the name is `ours` (as `cache_path` gives it), and an error where somebody chose it.
    """
    provenance = full_provenance(images.provenance(), features)
    damaged = None
    if path.is_file():
        try:
            return load_reference(path, provenance, dim=features.dim)
        except DamagedFileError as error:
            if not ours:
                raise
            say(f"{path} is made anew, it is damaged: {error.problem}")
            damaged = _state(path)

    def is_there() -> bool:
        return path.is_file() and _state(path) != damaged

    _compute(path, images, features, provenance, lease_s, say, is_there, ours)
    return load_reference(path, provenance, dim=features.dim)


def _state(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _compute(
    path: Path,
    images: Images,
    features: Network,
    provenance: Provenance,
    lease_s: float,
    say: Callable[[str], None],
    is_there: Callable[[], bool],
    ours: bool,
) -> None:
    try:
        check_writable(path.parent)
    except OSError as error:
        if not ours:  # the option that named the place is named in turn
            raise
        raise EvaluationError(
            f"cannot write reference statistics to {path.parent}: {error.strerror}; `tarflow reference --out FILE` makes them "
            "in another place, where evaluation.reference=FILE and `score --reference FILE` find them"
        ) from None
    total = images.num_images
    if total < 2:
        raise EvaluationError("reference statistics need at least 2 images: set evaluation.reference_images=0 for all")
    parts = -(-total // CHUNK)
    say(f"reference statistics of {total:,} images with {features.name}, once")
    # Named after what is computed, not after `path`: what a killed process left for other data must not be taken in.
    work = SharedWork(path.parent / "work" / cache_path(path, provenance).stem, {"chunks": parts}, lease_s)
    chunks = {f"reference-{k:05d}": k for k in range(parts)}

    def about(chunk: str) -> Provenance:
        return provenance | {"part": f"{chunks[chunk] + 1} of {parts}"}

    def load_chunk(place: Path) -> Reference:
        return _fitting(place, _read(place, least=0), about(place.name), (), features.dim)

    def whole(place: Path) -> bool:
        try:
            load_chunk(place)
        except UserError:
            return False
        return True

    for name in work.give_back(list(chunks), whole):
        say(f"  {work.path(name)} is damaged and computed again")

    def measure(name: str, temporary: Path) -> None:
        part, seen = chunks[name], 0
        first = part * total // parts
        statistics, kept = FeatureStatistics(features.dim), [torch.empty(0, features.dim)]
        hashes = []
        for pixels, _, _ in images.batches(False, 64, part, parts):
            rows = features(pixels)
            hashes.append(image_hashes(pixels.numpy()))
            statistics.add(rows)
            kept.append(rows[spread(first + seen + torch.arange(len(rows)), total, KEEP)])
            seen += len(rows)
        _write(temporary, statistics, torch.cat(kept), about(name), _together(hashes))
        if parts > 1:
            say(f"  images {first:,} to {first + seen - 1:,} of {total:,}")

    def merge(name: str, temporary: Path) -> None:
        statistics, kept, hashes = FeatureStatistics(features.dim), [], []
        for chunk in chunks:
            part = load_chunk(work.path(chunk))
            statistics.merge(part.statistics)
            kept.append(part.rows)
            hashes.append(part.hashes)
        _check_count(statistics.count, provenance)
        save_reference(path, statistics, provenance, torch.cat(kept), _together(hashes))
        temporary.touch()

    if work.work_through(list(chunks), measure, is_there):
        try:
            work.work_through(["merged"], merge, is_there)
        except UserError:
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


def _together(hashes: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """All of them, or None where a chunk by an earlier version lacks them."""
    there = [part for part in hashes if part is not None]
    return np.concatenate(there) if there and len(there) == len(hashes) else None


def save_reference(
    path: Path, statistics: FeatureStatistics, provenance: Provenance, rows: Tensor, hashes: np.ndarray | None = None
) -> None:
    """Write count, mean, scatter matrix, kept features, hashes and provenance; the file appears whole or not at all."""
    write_atomic(path, lambda temporary: _write(temporary, statistics, rows, provenance, hashes))


def _write(
    path: Path, statistics: FeatureStatistics, rows: Tensor, provenance: Provenance, hashes: np.ndarray | None
) -> None:
    count, mean, scatter = statistics.parts()
    with open(path, "wb") as file:
        arrays = {
            "format": np.array(FORMAT, dtype=np.int64),
            "count": np.array(count, dtype=np.int64),
            "mean": mean.numpy(),
            "scatter": scatter.numpy(),
            "rows": rows.numpy(),
            "provenance": np.array(json.dumps(provenance, sort_keys=True)),
        }
        write_npz(file, arrays if hashes is None else arrays | {"hashes": hashes})


def load_reference(path: Path, expected: Provenance, keys: tuple[str, ...] = (), dim: int = 0) -> Reference:
    """Read statistics; anything in their provenance that differs from `expected` is an error that names both values.

    `keys`: what must agree (default: everything but where the data lie). `dim`: how many features the network gives, if it
    is at hand. Raises DamagedFileError for a file that holds no statistics, or others than were written.
    """
    return _fitting(path, _read(path), expected, keys, dim)


def _read(path: Path, least: int = 2) -> ReferenceFile:
    if not path.is_file():
        raise EvaluationError(f"no reference statistics at {path}")
    try:
        return read_reference(path, least)
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror}") from None


def _fitting(path: Path, file: ReferenceFile, expected: Provenance, keys: tuple[str, ...], dim: int) -> Reference:
    stored = file.provenance
    differ = [
        f"{key}: {stored.get(key)!r} in the file, {expected.get(key)!r} here"
        for key in keys or sorted((stored.keys() | expected.keys()) - {_WHERE})
        if stored.get(key) != expected.get(key)
    ]
    if dim not in (0, len(file.mean)):
        differ.append(f"features of an image: {len(file.mean)} in the file, {dim} here")
    if differ:
        raise EvaluationError(
            f"the reference statistics at {path} were made from something else:\n  " + "\n  ".join(differ) + "\n"
            "name another file, or leave evaluation.reference out to have them computed from data.train"
        )
    statistics = FeatureStatistics.from_parts(file.count, file.mean, file.scatter)
    return Reference(statistics, stored, path, torch.from_numpy(file.rows), file.hashes, file.checked)
