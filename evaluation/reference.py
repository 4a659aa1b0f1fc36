"""Reference statistics: the features of a data set, computed once, with their provenance inside (contract 9).

The provenance says which data, how many images, which size, channels and crop, which feature network, weights and
preprocessing. Statistics of another provenance are refused, naming both values (case S04).
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from evaluation.errors import EvaluationError
from evaluation.features import Features
from evaluation.files import write_atomic
from evaluation.frechet import FeatureStatistics

FORMAT = 1
Provenance = dict[str, str | int]


@dataclass
class Reference:
    """Statistics of the real images and where they come from."""

    statistics: FeatureStatistics
    provenance: Provenance
    path: Path


def full_provenance(data: Provenance, features: Features) -> Provenance:
    """Provenance of statistics: of the data (fingerprint, images, size, channels, crop) and of the network."""
    return {
        **data,
        "features": features.name,
        "features_sha256": features.sha256,
        "preprocessing": features.preprocessing,
    }


def cache_path(folder: Path, provenance: Provenance) -> Path:
    """`reference-<features>-<hash>.npz`: one file per provenance."""
    digest = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"reference-{provenance['features']}-{digest}.npz"


def reference_statistics(
    path: Path,
    provenance: Provenance,
    features: Features,
    batches: Callable[[], Iterable[Tensor]],
) -> Reference:
    """The statistics stored at `path`, or computed from `batches()` (uint8 [n, C, H, W]) and stored there.

    A stored file of another provenance is an error, and so is a data set that yields another number of images.
    """
    if path.is_file():
        return load_reference(path, provenance)
    statistics = FeatureStatistics(features.dim)
    for pixels in batches():
        statistics.add(features(pixels))
    announced = int(provenance["images"])
    lost = announced - statistics.count
    if lost < 0 or (lost and provenance.get("damaged images") != "left out"):
        raise EvaluationError(
            f"the reference has {statistics.count} images, {announced} were announced: the data set changed "
            "while it was read; write its index anew"
        )
    if statistics.count < 2:
        raise EvaluationError("reference statistics need at least 2 images: set evaluation.reference_images=0 for all")
    save_reference(path, statistics, provenance)
    return Reference(statistics, provenance, path)


def save_reference(path: Path, statistics: FeatureStatistics, provenance: Provenance) -> None:
    """Write count, mean, scatter matrix and provenance; the file appears whole or not at all."""
    count, mean, scatter = statistics.parts()

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(
                file,
                format=np.int64(FORMAT),
                count=np.int64(count),
                mean=mean.numpy(),
                scatter=scatter.numpy(),
                provenance=np.array(json.dumps(provenance, sort_keys=True)),
            )

    write_atomic(path, write)


def load_reference(path: Path, expected: Provenance) -> Reference:
    """Read statistics; anything in their provenance that differs from `expected` is an error that names both values."""
    if not path.is_file():
        raise EvaluationError(f"no reference statistics at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            stored: Provenance = json.loads(str(file["provenance"]))
            version = int(file["format"])
            statistics = FeatureStatistics.from_parts(int(file["count"]), file["mean"], file["scatter"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"{path} is no file of reference statistics ({error}); remove it to have it made anew"
        ) from None
    if version != FORMAT:
        raise EvaluationError(
            f"{path} has format {version}, this program reads {FORMAT}; remove it to have it made anew"
        )
    differ = [
        f"{key}: {stored.get(key)!r} in the file, {expected.get(key)!r} here"
        for key in sorted(stored.keys() | expected.keys())
        if stored.get(key) != expected.get(key)
    ]
    if differ:
        raise EvaluationError(
            f"the reference statistics at {path} were made from something else:\n  " + "\n  ".join(differ) + "\n"
            "give another file, or leave evaluation's reference path out to have them computed from data.train"
        )
    return Reference(statistics, stored, path)
