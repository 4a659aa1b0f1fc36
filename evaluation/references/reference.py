"""Reference statistics on disk: the features of a real data set, with their provenance inside.

The provenance holds the data (fingerprint, images, size, channels, crop) and the feature network (weights,
preprocessing). Statistics of another provenance are refused, naming both values. The path of the data is recorded but
not compared: the fingerprint decides, so a copy elsewhere is the same data.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.frechet_distance import UNCOUNTED, FeatureStatistics
from tarflow.files import write_atomic
from tarflow.npz import write_npz
from tarflow.trainer.config.foreign_reference import ForeignReference
from tarflow.trainer.config.reference_file import FORMAT, ReferenceFile, read_reference

Provenance = dict[str, str | int]
Hashes = NDArray[np.uint64]
_DATA_PATH = "data"  # the only entry that may differ


class Network(Protocol):
    """A feature network, as `networks.features.Features` implements it."""

    name: str
    sha256: str
    preprocessing: str
    dim: int
    spatial_dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """Pixels uint8 [n, C, H, W] to features [n, dim]."""

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and spatial features [n, spatial_dim]."""


@dataclass
class Reference:
    """Statistics of the real images and their provenance; `rows` [m, d] are the features kept."""

    statistics: FeatureStatistics
    provenance: Provenance
    path: Path
    rows: Tensor
    hashes: Hashes | None = None  # [images], of the pixels; files of version 0.1 have none
    checked: bool = True  # False: a file without a checksum
    spatial: FeatureStatistics | None = None  # of spatial features; None: the file holds none

    @property
    def images_used(self) -> int | None:
        """How many images; None where the file does not record it."""
        return None if self.statistics.count == UNCOUNTED else self.statistics.count

    @property
    def notes(self) -> list[str]:
        """What a user should know of this file before he compares with it."""
        if "form" in self.provenance:
            number = "how many, " if self.images_used is None else ""
            return [
                f"{self.path} is in the form of {self.provenance['form']}: mean and covariance of the features of "
                f"{self.provenance['features']}. It does not record which images they are of, {number}or how these were "
                f"cropped and resized, and carries no checksum: its SHA-256 is {self.provenance['file_sha256']}"
            ]
        return [] if self.checked else [f"{self.path} carries no checksum: its bytes cannot be verified"]

    def without_spatial(self, network: Network) -> list[str]:
        """A line where a network has spatial features and the file holds no statistics of them."""
        if self.spatial is not None or not network.spatial_dim:
            return []
        ours = "form" not in self.provenance
        way_out = f": move it away, and it is computed again with them ({network.name})" if ours else ""
        return [f"{self.path} holds no statistics of spatial features, so there is no sFID{way_out}"]

    def describe(self) -> dict[str, Any]:
        """The provenance for a result; `checked` is false if the file carries no checksum."""
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
    identity = {key: value for key, value in provenance.items() if key != _DATA_PATH} | {"format": FORMAT}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"reference-{provenance['features']}-{digest}.npz"


def save_reference(
    path: Path,
    statistics: FeatureStatistics,
    provenance: Provenance,
    rows: Tensor,
    hashes: Hashes | None = None,
    spatial: FeatureStatistics | None = None,
) -> None:
    """Write statistics, kept features, hashes and provenance; the file appears complete or not at all."""
    write_atomic(path, lambda temporary: write_statistics(temporary, statistics, provenance, rows, hashes, spatial))


def write_statistics(
    path: Path,
    statistics: FeatureStatistics,
    provenance: Provenance,
    rows: Tensor,
    hashes: Hashes | None,
    spatial: FeatureStatistics | None = None,
) -> None:
    """The same, straight to `path`: for a temporary file that is renamed later."""
    count, mean, scatter = statistics.parts()
    arrays = {
        "format": np.array(FORMAT, dtype=np.int64),
        "count": np.array(count, dtype=np.int64),
        "mean": mean.numpy(),
        "scatter": scatter.numpy(),
        "rows": rows.numpy(),
        "provenance": np.array(json.dumps(provenance, sort_keys=True)),
    }
    if hashes is not None:
        arrays["hashes"] = hashes
    if spatial is not None and spatial.dim:
        _, spatial_mean, spatial_scatter = spatial.parts()
        arrays |= {"spatial_mean": spatial_mean.numpy(), "spatial_scatter": spatial_scatter.numpy()}
    with open(path, "wb") as file:
        write_npz(file, arrays)


def load_reference(
    path: Path, expected: Provenance, keys: tuple[str, ...] = (), dim: int = 0, at_least: int = 2, spatial_dim: int = 0
) -> Reference:
    """Read statistics; any difference between their provenance and `expected` is an error that names both values.

    `keys`: entries to compare (default: all but the path of the data). `dim`, `spatial_dim`: numbers of features and of
    spatial features of the network, 0 if it is not at hand or has none. `at_least`: fewest images. Raises DamagedFileError
    for a file that does not hold statistics, or not those that were written.
    """
    file = _read(path, at_least)
    differences = _differences(file, expected, keys) + _other_size(file, dim, spatial_dim)
    if differences:
        raise EvaluationError(
            f"the reference statistics at {path} were made from something else:\n  " + "\n  ".join(differences) + "\n"
            "name another file, or leave evaluation.reference out to have them computed from data.train"
        )
    if isinstance(file, ForeignReference):
        statistics = FeatureStatistics.of_moments(file.mean, file.covariance, file.count)
        theirs, none = file.spatial, torch.empty(0, statistics.dim)
        spatial = FeatureStatistics.of_moments(theirs.mean, theirs.covariance) if theirs is not None else None
        return Reference(statistics, file.provenance, path, none, checked=False, spatial=spatial)
    statistics = FeatureStatistics.from_parts(file.count, file.mean, file.scatter)
    spatial = FeatureStatistics.from_parts(file.count, *file.spatial) if file.spatial is not None else None
    rows = torch.from_numpy(file.rows)
    return Reference(statistics, file.provenance, path, rows, file.hashes, file.checked, spatial)


def _read(path: Path, at_least: int) -> ReferenceFile | ForeignReference:
    if not path.is_file():
        raise EvaluationError(f"no reference statistics at {path}")
    try:
        return read_reference(path, at_least)
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror}") from None


def _differences(file: ReferenceFile | ForeignReference, expected: Provenance, keys: tuple[str, ...]) -> list[str]:
    stored = file.provenance
    if isinstance(file, ForeignReference):
        here = str(expected.get("features"))
        # After the dash stands the hash of weights that are not published.
        same = here.partition("-")[0] in file.networks
        found = [] if same else [f"features: {stored['features']} in the file ({stored['form']}), {here} here"]
        sizes = stored.get("image_size"), expected.get("image_size")
        if None not in sizes and sizes[0] != sizes[1]:
            found.append(f"image_size: the images in the file have {sizes[0]} pixels, {sizes[1]} here")
        return found
    return [
        f"{key}: {stored.get(key)!r} in the file, {expected.get(key)!r} here"
        for key in keys or sorted((stored.keys() | expected.keys()) - {_DATA_PATH})
        if stored.get(key) != expected.get(key)
    ]


def _other_size(file: ReferenceFile | ForeignReference, dim: int, spatial_dim: int) -> list[str]:
    found = [] if dim in (0, len(file.mean)) else [f"features of an image: {len(file.mean)} in the file, {dim} here"]
    if file.spatial is None or not spatial_dim:
        return found
    width = len(file.spatial.mean if isinstance(file, ForeignReference) else file.spatial[0])
    return (
        found
        if width == spatial_dim
        else [*found, f"spatial features of an image: {width} in the file, {spatial_dim} here"]
    )
