"""`tarflow score`: a folder of images, or a file of an array of them, against reference statistics or another folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow import terminal
from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.images.identical import count_identical
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.array import ImageArray
from tarflow.evaluation.images.folder import ImageFolder
from tarflow.evaluation.log import Log
from tarflow.evaluation.metrics.all_scores import feature_scores, spatial_scores
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics
from tarflow.evaluation.metrics.names import is_distance, is_kernel, is_spatial
from tarflow.evaluation.networks.features import Features
from tarflow.evaluation.references.compute import KEEP, spread_evenly
from tarflow.evaluation.references.images_inside import reference_rows
from tarflow.evaluation.references.reference import load_reference
from tarflow.evaluation.samples.weights_source import resolve_device
from tarflow.image_size import Size, parse_size, plain
from tarflow.records import write_object

FORMAT = 1


@dataclass
class ScoreRequest:
    """Which folder to compare with what."""

    folder: Path
    reference: Path | None  # statistics of `tarflow reference`
    against: Path | None  # another folder of images
    size: Size | None
    channels: int | None
    features: str
    features_file: Path | None
    on_error: str
    out: Path | None
    device: str
    max_pixels: int = MAX_PIXELS


@dataclass
class _Baseline:
    """What the folder is compared with, and the size at which it is read."""

    statistics: FeatureStatistics
    rows: Tensor
    spatial: FeatureStatistics | None
    hashes: NDArray[np.uint64] | None
    size: Size | None  # None: the images' own
    channels: int
    about: dict[str, Any]
    warnings: list[str]


def score_folder(request: ScoreRequest, log: Log = print) -> dict[str, Any]:
    """Measure a folder; the result, which is also written to `request.out`."""
    if (request.reference is None) == (request.against is None):
        raise EvaluationError("give what to compare with: either --reference FILE or --against FOLDER")
    network = Features(request.features, resolve_device(request.device), request.features_file)
    baseline = _stored(request, network, log) if request.reference is not None else _other_folder(request, network, log)
    folder = _images(request, request.folder, baseline.channels, baseline.size)
    found = measure(folder, network, log)
    scores = feature_scores(
        network, found.statistics, found.rows, baseline.statistics, baseline.rows, names=("scored", "reference")
    )
    scores |= spatial_scores(network, found.spatial, baseline.spatial, found.spatial_rows)
    warnings = folder.warnings() + baseline.warnings + scores.pop("warnings")
    # Only known once every image was read: the hashes are of the pixels that the network saw.
    identical = None if baseline.hashes is None else count_identical(folder.hashes, baseline.hashes)
    if identical:
        warnings.append(
            f"{identical} of {folder.used} images in {folder.root} are, pixel for pixel, among the reference's"
        )
    result = {
        "format": FORMAT,
        **scores,
        "identical_images": identical,
        "images": folder.describe(),
        "reference": baseline.about,
        "features": {"name": network.name, "sha256": network.sha256, "preprocessing": network.preprocessing},
        "warnings": warnings,
    }
    if request.out:
        write_object(request.out, result)
    for line in warnings:
        log(f"note: {line}")
    log(terminal.plain(_headline(result), 2000))
    plain: dict[str, Any] = json.loads(json.dumps(result))
    return plain


def _stored(request: ScoreRequest, network: Features, log: Log) -> _Baseline:
    """The statistics of `request.reference`. Raises EvaluationError if they are of another network or size."""
    expected: dict[str, str | int] = {
        "features": network.name,
        "features_sha256": network.sha256,
        "preprocessing": network.preprocessing,
    }
    given = {"image_size": request.size and plain(request.size), "channels": request.channels}
    expected |= {key: value for key, value in given.items() if value is not None}
    assert request.reference is not None
    found = load_reference(request.reference, expected, tuple(expected), network.dim, spatial_dim=network.spatial_dim)
    known = found.provenance.get("image_size")
    size = request.size if known is None else parse_size(known)
    channels = int(found.provenance.get("channels", request.channels or 3))
    about = {"file": request.reference.name, **found.describe()}
    notes = found.notes + found.without_spatial(network)
    rows = reference_rows(found, network, log)
    return _Baseline(found.statistics, rows, found.spatial, found.hashes, size, channels, about, notes)


def _other_folder(request: ScoreRequest, network: Features, log: Log) -> _Baseline:
    """The images of `request.against`; without --size, theirs is the size at which the folder is read, too."""
    assert request.against is not None
    channels = request.channels or 3
    other = _images(request, request.against, channels, request.size)
    found = measure(other, network, log)
    about, warnings = other.describe(), other.warnings()
    return _Baseline(found.statistics, found.rows, found.spatial, other.hashes, other.size, channels, about, warnings)


def _images(request: ScoreRequest, place: Path, channels: int, size: Size | None) -> ImageFolder | ImageArray:
    if place.suffix == ".npz":
        return ImageArray(place, channels, size)
    return ImageFolder(place, channels, size, request.on_error, request.max_pixels)


@dataclass
class _Measured:
    """Statistics of all images, and the features of at most 10,000 of them, spread evenly."""

    statistics: FeatureStatistics
    rows: Tensor
    spatial: FeatureStatistics
    spatial_rows: Tensor


def measure(folder: ImageFolder | ImageArray, network: Features, log: Log) -> _Measured:
    """Put all images through the network."""
    log(f"{folder.num_images:,} images in {folder.root} with {network.name}")
    statistics, kept = FeatureStatistics(network.dim), [torch.empty(0, network.dim)]
    spatial, spatial_kept = FeatureStatistics(network.spatial_dim), [torch.empty(0, network.spatial_dim)]
    seen = 0
    for pixels in folder.batches():
        rows, spatial_rows = network.with_spatial(pixels)
        statistics.add(rows)
        spatial.add(spatial_rows)
        keep = spread_evenly(seen + torch.arange(len(rows)), folder.num_images, KEEP)
        kept.append(rows[keep])
        spatial_kept.append(spatial_rows[keep])
        seen += len(rows)
    return _Measured(statistics, torch.cat(kept), spatial, torch.cat(spatial_kept))


def _headline(result: dict[str, Any]) -> str:
    parts = []
    for key, value in result.items():
        kinds = {"distance_stderr": is_distance, "spatial_stderr": is_spatial, "kernel_stderr": is_kernel}
        error = next((result.get(name) for name, is_kind in kinds.items() if is_kind(key)), None)
        if value is not None and any(is_kind(key) for is_kind in kinds.values()):
            parts.append(f"{key} {value:.4g}" + (f" +- {error:.2g}" if error is not None else ""))
        elif key in ("precision", "recall", "density", "coverage", "inception_score"):
            parts.append(f"{key.replace('_', ' ')} {value:.3f}")
    return " | ".join(parts)
