"""Compute reference statistics together with any other processes.

The images are split into chunks of fixed size, which are merged in order: the bits do not depend on who computed what.
The features of some images, spread evenly, are kept beside the sums for the metrics that need them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tarflow.data_pipeline.images.identical import image_hashes
from tarflow.errors import UserError
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log, no_log
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics
from tarflow.evaluation.references.reference import (
    Hashes,
    Network,
    Provenance,
    Reference,
    cache_path,
    full_provenance,
    load_reference,
    save_reference,
    write_statistics,
)
from tarflow.evaluation.shared_work import SharedWork
from tarflow.files import check_writable, fill
from tarflow.records import DamagedFileError

CHUNK = 1024  # images
KEEP = 10_000  # images whose features are kept
BATCH = 64


class Images(Protocol):
    """Real images, as `images.data_set.ImageSet` implements them."""

    @property
    def num_images(self) -> int:
        """How many `batches` will give."""

    @property
    def skips_damaged(self) -> bool:
        """Whether `batches` may give fewer than `num_images`, because damaged ones are skipped."""

    def provenance(self) -> Provenance:
        """What statistics of these images depend on."""

    def batches(
        self, labelled: bool, batch_size: int = ..., part: int = ..., parts: int = ...
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(pixels uint8 [n, C, H, W], labels [n], ids [n]) of one of several parts."""


def reference_statistics(
    path: Path, images: Images, features: Network, lease_s: float = 120.0, log: Log = no_log, ours: bool = True
) -> Reference:
    """The statistics stored at `path`, or computed together with any other workers, and stored there.

    A stored file of another provenance is an error, and so is a data set that yields another number of images. A damaged
    file is rebuilt where the name is `ours` (as `cache_path` gives it); where a user chose the name, it is an error.
    """
    provenance = full_provenance(images.provenance(), features)
    damaged = None
    if path.is_file():
        try:
            return load_reference(path, provenance, dim=features.dim, spatial_dim=features.spatial_dim)
        except DamagedFileError as error:
            if not ours:
                raise
            log(f"{path} is damaged and will be rebuilt: {error.problem}")
            damaged = _version(path)

    def is_stored() -> bool:
        return path.is_file() and _version(path) != damaged

    _check_can_write(path.parent, ours)
    if images.num_images < 2:
        raise EvaluationError("reference statistics need at least 2 images: set evaluation.reference_images=0 for all")
    log(f"reference statistics of {images.num_images:,} images with {features.name}, once")
    computation = _Computation(path, images, features, provenance, log)
    computation.run(lease_s, is_stored)
    return load_reference(path, provenance, dim=features.dim, spatial_dim=features.spatial_dim)


def _version(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check_can_write(folder: Path, ours: bool) -> None:
    try:
        check_writable(folder)
    except OSError as error:
        if not ours:  # a user chose the place with an option, which the command names in its own message
            raise
        raise EvaluationError(
            f"cannot write reference statistics to {folder}: {error.strerror}; `tarflow reference --out FILE` makes them "
            "in another place, where evaluation.reference=FILE and `score --reference FILE` find them"
        ) from None


@dataclass
class _Computation:
    """The statistics of one data set under one network: chunks, then their sum."""

    path: Path
    images: Images
    features: Network
    provenance: Provenance
    log: Log

    def __post_init__(self) -> None:
        self.total = self.images.num_images
        self.parts = -(-self.total // CHUNK)
        self.chunks = {f"reference-{k:05d}": k for k in range(self.parts)}

    def run(self, lease_s: float, is_stored: Callable[[], bool]) -> None:
        """Help until the statistics are stored, by any worker."""
        # The folder is named after the provenance, not after `path`: chunks that a killed process left for other data
        # must not be picked up.
        folder = self.path.parent / "work" / cache_path(self.path, self.provenance).stem
        self.work = SharedWork(folder, {"chunks": self.parts}, lease_s)
        names = list(self.chunks)
        for name in self.work.give_back(names, self._is_valid):
            self.log(f"  {self.work.path(name)} is damaged and computed again")
        if self.work.work_through(names, self._compute_chunk, is_stored):
            try:
                self.work.work_through(["merged"], lambda _name, temporary: self._merge(temporary), is_stored)
            except UserError:
                self.work.remove()  # the data set changed under the chunks: none of them is of use
                raise
        self.work.remove()

    def _compute_chunk(self, name: str, temporary: Path) -> None:
        part, seen = self.chunks[name], 0
        first = part * self.total // self.parts
        statistics, spatial = self._empty()
        kept = [torch.empty(0, self.features.dim)]
        hashes: list[Hashes | None] = []
        for pixels, _, _ in self.images.batches(False, BATCH, part, self.parts):
            rows, spatial_rows = self.features.with_spatial(pixels)
            hashes.append(image_hashes(pixels.numpy()))
            statistics.add(rows)
            spatial.add(spatial_rows)
            # By position in the whole set, so that the rows kept do not depend on the chunks.
            kept.append(rows[spread_evenly(first + seen + torch.arange(len(rows)), self.total, KEEP)])
            seen += len(rows)
        provenance, together = self._provenance_of(name), _concatenated(hashes)
        write_statistics(temporary, statistics, provenance, torch.cat(kept), together, spatial)
        if self.parts > 1:
            self.log(f"  images {first:,} to {first + seen - 1:,} of {self.total:,}")

    def _merge(self, temporary: Path) -> None:
        (statistics, spatial), kept, hashes = self._empty(), [], []
        for name in self.chunks:
            part = self._load_chunk(self.work.path(name))
            statistics.merge(part.statistics)
            if part.spatial is not None:
                spatial.merge(part.spatial)
            kept.append(part.rows)
            hashes.append(part.hashes)
        _check_count(statistics.count, self.images)
        save_reference(self.path, statistics, self.provenance, torch.cat(kept), _concatenated(hashes), spatial)
        fill(temporary, "")  # the unit of work needs a result; the statistics themselves are at `path`

    def _provenance_of(self, chunk: str) -> Provenance:
        return self.provenance | {"part": f"{self.chunks[chunk] + 1} of {self.parts}"}

    def _load_chunk(self, place: Path) -> Reference:
        dims = self.features.dim, self.features.spatial_dim
        found = load_reference(place, self._provenance_of(place.name), dim=dims[0], at_least=0, spatial_dim=dims[1])
        if dims[1] and found.spatial is None:  # by a version that knew no spatial features
            raise DamagedFileError(place, "it holds no spatial statistics", "start the command again")
        return found

    def _empty(self) -> tuple[FeatureStatistics, FeatureStatistics]:
        """Statistics of features and of spatial features."""
        return FeatureStatistics(self.features.dim), FeatureStatistics(self.features.spatial_dim)

    def _is_valid(self, place: Path) -> bool:
        try:
            self._load_chunk(place)
        except UserError:
            return False
        return True


def spread_evenly(positions: Tensor, total: int, keep: int) -> Tensor:
    """Which of `positions` are among `keep` spread evenly over 0..total-1: bool of the same shape."""
    if total <= keep:
        return torch.ones(len(positions), dtype=torch.bool)
    return (positions + 1) * keep // total > positions * keep // total


def _check_count(count: int, images: Images) -> None:
    announced = images.num_images
    lost = announced - count
    if lost < 0 or (lost and not images.skips_damaged):
        raise EvaluationError(
            f"the reference has {count} images, {announced} were announced: the data set changed "
            "while it was read; rebuild its index"
        )


def _concatenated(hashes: Sequence[Hashes | None]) -> Hashes | None:
    """All hashes, or None where a chunk by an earlier version has none."""
    known = [part for part in hashes if part is not None]
    return np.concatenate(known) if known and len(known) == len(hashes) else None
