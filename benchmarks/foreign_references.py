"""FID and sFID of the same images against one set of statistics in ADM's form and in ours, by the FID Inception.

    python -m benchmarks.foreign_references DATA [--weights pt_inception-2015-12-05-6726825d.pth] [--keep DIR]
                                           [--quick] [--check]

DATA: a folder of indexed shards; 2,000 of its images are the reference, and 2,000 are scored. What ADM's evaluator would store
is computed here as it does: numpy's mean and covariance of all features at once. Without --weights the network has random
weights, all of them drawn: then the distances mean nothing, and agree all the same. The last column is the formula of ADM's
evaluator, with scipy's square root of the product, which is itself inexact where there are fewer images than features.

Nearly all of the time goes into the network, on a loaded machine an hour: a line tells how far it is, and with --keep DIR the
features are written there, a part at a time, so that the same call after a time limit goes on with what is missing.
"""

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common import Bar, finish, parse_args
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics, frechet_distance
from tarflow.evaluation.networks.features import Features
from tarflow.evaluation.networks.inception import Inception
from tarflow.evaluation.references.reference import load_reference, save_reference
from tarflow.models.config import TarFlowConfig

AGREE = 1e-6
PART, BATCH = 200, 64  # images of a part that is kept, and in a pass
Rows = tuple[Tensor, Tensor]  # features [n, 2048], spatial features [n, 2023]


def random_weights(path: Path) -> None:
    """A file of weights like the published one, drawn so that the size of activations stays the same from layer to layer."""
    network, draw = Inception("fid"), torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
        elif tensor.is_floating_point():
            fan = tensor[0].numel() if tensor.ndim > 1 else 1
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * (0.3 if tensor.ndim == 1 else (2 / fan) ** 0.5))
            if tensor.ndim == 1 and name.endswith("weight"):
                tensor.add_(1)
    torch.save(network.state_dict(), path)


def features_of(images: ImageSet, network: Features, keep: Path) -> tuple[Rows, Rows]:
    """Of every other image, and of those between them. `keep`: folder of the parts that are done."""
    identity = json.dumps([images.provenance(), network.name, network.sha256, network.preprocessing], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    rows: list[Rows] = []
    parts, begin = max(1, images.num_images // PART), time.monotonic()
    for part in range(parts):
        path = keep / f"features-{digest}-{part:04d}-of-{parts:04d}.npz"
        if not path.exists():
            found = [network.with_spatial(pixels) for pixels, _, _ in images.batches(False, BATCH, part, parts)]
            arrays = [torch.cat(pieces).numpy() for pieces in zip(*found)]
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.savez(file, features=arrays[0], spatial=arrays[1])
            temporary.replace(path)
            minutes = (time.monotonic() - begin) / 60
            print(f"features: {part + 1} of {parts} parts after {minutes:.1f} minutes", file=sys.stderr, flush=True)
        with np.load(path) as stored:
            rows.append((torch.from_numpy(stored["features"]), torch.from_numpy(stored["spatial"])))
    features, spatial = (torch.cat(pieces) for pieces in zip(*rows))
    return (features[::2], spatial[::2]), (features[1::2], spatial[1::2])


def as_adm(rows: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance as ADM's evaluator computes them."""
    array = rows.numpy().astype(np.float64)
    return np.mean(array, axis=0), np.cov(array, rowvar=False)


def by_adm(first: Tensor, second: Tensor) -> float:
    """The distance as ADM's evaluator computes it."""
    (m1, c1), (m2, c2) = as_adm(first), as_adm(second)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return float((m1 - m2) @ (m1 - m2) + np.trace(c1) + np.trace(c2) - 2 * np.trace(root))


def statistics(rows: Tensor) -> FeatureStatistics:
    found = FeatureStatistics(rows.shape[1])
    found.add(rows)
    return found


def main() -> int:
    args = parse_args(__doc__.splitlines()[0], (
        ("data", {"metavar": "DATA"}),
        ("--weights", {"type": Path, "metavar": "FILE"}),
        ("--keep", {"type": Path, "metavar": "DIR", "help": "where features are kept for the next call"}),
        ("--size", {"type": int, "default": 28, "metavar": "N"}),
        ("--channels", {"type": int, "default": 1, "choices": (1, 3)}),
    ))  # fmt: skip
    number = 100 if args.quick else 2000
    shape = TarFlowConfig(
        image_size=args.size, patch_size=args.size, in_channels=args.channels, channels=64, num_blocks=1,
        layers_per_block=1,
    )  # fmt: skip
    rows, bars = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        weights = args.weights or folder / "random.pth"
        if args.weights is None:
            random_weights(weights)
        network = Features("fid_inception", file=weights)
        keep = args.keep or folder
        keep.mkdir(parents=True, exist_ok=True)
        reference, scored = features_of(ImageSet(DataSettings.of(args.data), shape, 2 * number), network, keep)
        moments = [as_adm(part) for part in reference]
        np.savez(folder / "adm.npz", mu=moments[0][0], sigma=moments[0][1], mu_s=moments[1][0], sigma_s=moments[1][1])
        about: dict[str, str | int] = {
            "fingerprint": "benchmark", "images": number, "image_size": args.size, "channels": args.channels,
            "features": network.name, "features_sha256": network.sha256, "preprocessing": network.preprocessing,
        }  # fmt: skip
        none = torch.empty(0, network.dim)
        save_reference(
            folder / "ours.npz", statistics(reference[0]), about, none, spatial=statistics(reference[1])
        )  # fmt: skip
        ours, theirs = (
            load_reference(folder / f"{name}.npz", about, dim=network.dim, spatial_dim=network.spatial_dim)
            for name in ("ours", "adm")
        )
        pairs = ((ours.statistics, theirs.statistics), (ours.spatial, theirs.spatial))
        for name, sample, real, (own, other) in zip(("fid", "sfid"), scored, reference, pairs):
            assert own is not None
            assert other is not None
            found = [frechet_distance(statistics(sample), side).distance for side in (own, other)]
            rows.append((name, *found, by_adm(sample, real)))
            difference = abs(found[1] - found[0]) / found[0]
            bars.append(Bar(f"{name}: relative difference", difference, at_most=AGREE, reason="the same statistics"))
    header = (f"{number} images against {number}, {network.name}", "ours", "ADM's form", "by its formula")
    return finish(args, rows, header, bars, packages=("torch", "numpy", "scipy"))


if __name__ == "__main__":
    sys.exit(main())
