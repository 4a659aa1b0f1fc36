"""What a chunk contributes to a result: small arrays in a file, merged in the order of chunks and in no other.

A chunk of samples holds the count, mean and scatter matrix of its features (float64, centred so that a large mean costs
no digits), the features themselves as far as they are kept, how many samples were lost, and the pixels that later steps
need. A chunk of held-out images holds bits per dimension per image and draw. Merging reads one chunk at a time: memory
does not grow with their number.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow.data_pipeline.images.identical import image_hashes
from tarflow.evaluation.metrics.bits_per_dim import BitsPerDim, NoiseSettings
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics
from tarflow.evaluation.samples.draw import Drawn, SampleCount
from tarflow.evaluation.stopwatch import Stopwatch
from tarflow.evaluation.worker.chunk_file import (
    LIKELIHOOD,
    SAMPLES,
    WAY_OUT,
    WHAT,
    About,
    Chunk,
    read_chunk,
    write_chunk,
)
from tarflow.evaluation.worker.chunk_plan import ChunkPlan
from tarflow.evaluation.worker.pictures import GridImages
from tarflow.evaluation.worker.task import EvaluationTask
from tarflow.records import DamagedFileError


@dataclass
class Keep:
    """Which samples contribute more than sums, by their index."""

    features: int  # of the first N samples
    pixels: int  # of the first N samples
    grid: GridImages


class SamplesPart:
    """The samples of one chunk, added batch by batch; or several chunks, merged."""

    def __init__(self, dim: int, keep: Keep, spatial_dim: int = 0) -> None:
        """`dim`, `spatial_dim`: numbers of features and of spatial features; 0: no sums of the latter are kept."""
        self.count = SampleCount()
        self.statistics, self.spatial = FeatureStatistics(dim), FeatureStatistics(spatial_dim)
        self.keep = keep
        self._features: list[Tensor] = []
        self._pixels: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._hashes: list[NDArray[np.uint64] | None] = []

    def add(self, drawn: Drawn, pixels: Tensor, features: Tensor, spatial: Tensor | None = None) -> None:
        """Add a batch with the pixels uint8 [m, C, H, W], features [m, d] and spatial features of its finite samples."""
        self.count.add(drawn)
        self.keep.grid.add(drawn)
        self.statistics.add(features)
        if self.spatial.dim and spatial is not None:
            self.spatial.add(spatial)
        index = torch.tensor(drawn.finite_indices(), dtype=torch.int64)
        self._features.append(features[index < self.keep.features].float().cpu())
        self._pixels.append(pixels[index < self.keep.pixels])
        self._hashes.append(image_hashes(pixels.cpu().numpy()))
        self._labels.append(drawn.labels[drawn.finite][index < self.keep.pixels])

    @property
    def features(self) -> Tensor:
        """float32 [m, d], by sample index."""
        return torch.cat(self._features) if self._features else torch.empty(0, self.statistics.dim)

    @property
    def hashes(self) -> NDArray[np.uint64] | None:
        """uint64 [samples], of their pixels; None where a version without hashes wrote a chunk."""
        known = [part for part in self._hashes if part is not None]
        return np.concatenate(known) if known and len(known) == len(self._hashes) else None

    @property
    def pixels(self) -> Tensor:
        """uint8 [m, C, H, W], by sample index."""
        return torch.cat(self._pixels) if self._pixels else torch.empty(0, 0, 0, 0, dtype=torch.uint8)

    @property
    def labels(self) -> Tensor:
        """int64 [m]: the labels of `pixels`."""
        return torch.cat(self._labels) if self._labels else torch.empty(0, dtype=torch.int64)

    def save(self, chunk: Chunk, about: dict[str, Any]) -> None:
        """Write the chunk; `about`: who computed it and how long it took."""
        write_chunk(
            chunk,
            about,
            count=np.array([self.statistics.count], dtype=np.int64),
            **_packed(self.statistics),
            **(_packed(self.spatial, "spatial_") if self.spatial.dim else {}),
            features=self.features.numpy(),
            pixels=self.pixels.numpy(),
            labels=self.labels.numpy(),
            hashes=np.zeros(0, dtype=np.uint64) if self.hashes is None else self.hashes,
            **{f"lost_{key}": value for key, value in self.count.arrays().items()},
            **{f"grid_{key}": value for key, value in self.keep.grid.arrays().items()},
        )

    def merge(self, chunk: Chunk) -> About:
        """Add a chunk's file; who computed it. Raises DamagedFileError for a file of another chunk."""
        arrays, about = read_chunk(chunk, SAMPLES)
        for statistics, prefix in ((self.statistics, ""), (self.spatial, "spatial_")):
            if statistics.dim and len(arrays.get(f"{prefix}mean", ())) != statistics.dim:
                raise DamagedFileError(chunk.path, "its features have another width", WAY_OUT, what=WHAT)
            if statistics.dim:
                statistics.merge(_statistics(arrays, prefix))
        self.count.merge(_named(arrays, "lost_"))
        self.keep.grid.merge(_named(arrays, "grid_"))
        self._hashes.append(arrays.get("hashes"))
        for kept, name in ((self._features, "features"), (self._pixels, "pixels"), (self._labels, "labels")):
            if len(arrays[name]):
                kept.append(torch.from_numpy(arrays[name]))
        return about


def empty_part(task: EvaluationTask) -> SamplesPart:
    """A part without samples, which keeps what the result of `task` needs."""
    # Where the grid is drawn separately, no sample belongs to it.
    grid = task.empty_grid() if task.grid_is_sampled else GridImages(0, 0, 0)
    keep = Keep(task.settings.keep_features, task.settings.neighbour_samples, grid)
    return SamplesPart(task.real.features.dim, keep, task.real.features.spatial_dim)


def chunk_statistics(chunks: Iterable[Chunk], prefix: str = "") -> Iterator[FeatureStatistics]:
    """The statistics of each chunk of samples alone: for error bars from chunk to chunk. `prefix`: "" or "spatial_"."""
    for chunk in chunks:
        yield _statistics(read_chunk(chunk, SAMPLES)[0], prefix)


def save_likelihood(chunk: Chunk, part: BitsPerDim, about: dict[str, Any]) -> None:
    """Write the bits per dimension of a chunk of held-out images."""
    ids = sorted(part.values)
    values = np.array([part.values[i] for i in ids], dtype=np.float64).reshape(len(ids), -1)
    dims = np.array([part.dims], dtype=np.int64)
    write_chunk(chunk, about, ids=np.array(ids, dtype=np.int64), values=values, dims=dims)


@dataclass
class MergedLikelihood:
    """The chunks of held-out images, merged."""

    noise: NoiseSettings
    bits: BitsPerDim = field(init=False)

    def __post_init__(self) -> None:
        self.bits = BitsPerDim(self.noise)

    def merge(self, chunk: Chunk) -> About:
        """Add a chunk's file; who computed it. Raises DamagedFileError for a file of another chunk."""
        arrays, about = read_chunk(chunk, LIKELIHOOD)
        self.bits.put(arrays["ids"].tolist(), arrays["values"].tolist(), int(arrays["dims"][0]))
        return about


@dataclass
class MergedChunks:
    """All chunks of a result, and who computed them."""

    samples: SamplesPart
    likelihood: MergedLikelihood
    seconds: dict[str, float]  # by phase, all workers together
    workers: dict[str, list[str]]  # worker -> chunks
    codes: list[dict[str, Any]]  # versions of the code, this process's first
    batches: dict[str, list[int]] = field(default_factory=dict)  # stage -> images at a time, of all workers


def merge_chunks(plan: ChunkPlan) -> MergedChunks:
    """Read all chunks in the order of the plan. Raises DamagedFileError."""
    samples, likelihood = empty_part(plan.task), MergedLikelihood(plan.task.settings.likelihood)
    watch, workers, codes = Stopwatch(), dict[str, list[str]](), [plan.task.code]
    batches: dict[str, set[int]] = {}
    for name in plan.names:
        about = (samples if name in plan.samples else likelihood).merge(plan.chunk(name))
        watch.add(about.seconds)
        workers.setdefault(about.by, []).append(name)
        if about.code and about.code not in codes:
            codes.append(about.code)
        for stage, size in about.batches.items():
            batches.setdefault(stage, set()).add(size)
    used = {stage: sorted(sizes) for stage, sizes in sorted(batches.items())}
    return MergedChunks(samples, likelihood, watch.seconds, workers, codes, used)


def _packed(statistics: FeatureStatistics, prefix: str = "") -> dict[str, NDArray[Any]]:
    """Mean, and the upper half of the scatter matrix, which is symmetric."""
    _, mean, scatter = statistics.parts()
    return {f"{prefix}mean": mean.numpy(), f"{prefix}scatter": scatter.numpy()[np.triu_indices(statistics.dim)]}


def _statistics(arrays: dict[str, NDArray[Any]], prefix: str = "") -> FeatureStatistics:
    mean = arrays[f"{prefix}mean"]
    scatter = np.zeros((len(mean), len(mean)))
    scatter[np.triu_indices(len(mean))] = arrays[f"{prefix}scatter"]
    scatter += np.triu(scatter, 1).T
    return FeatureStatistics.from_parts(int(arrays["count"][0]), mean, scatter)


def _named(arrays: dict[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
