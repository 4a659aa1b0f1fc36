"""Reference statistics of a data set, made once and ahead of the evaluations that look for them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.evaluation.image_set import ImageSet
from tarflow.evaluation.networks.features import Features
from tarflow.evaluation.samples.weights_source import resolve_device
from tarflow.evaluation.worker.reference import Reference, cache_path, full_provenance, reference_statistics
from tarflow.models.config import TarFlowConfig


@dataclass
class ReferenceRequest:
    """Which statistics to make."""

    data: str
    size: int
    channels: int
    images: int  # spread evenly over the data; 0 = all
    features: str
    features_file: Path | None
    out: Path | None  # None = beside the data
    on_error: str
    device: str


def make_reference(request: ReferenceRequest, say: Callable[[str], None] = print) -> Reference:
    """Compute statistics, with whoever runs the same command, or find them there already."""
    # Of the model only the shape of its images counts.
    shape = TarFlowConfig(
        image_size=request.size, patch_size=request.size, in_channels=request.channels, channels=64, num_blocks=1,
        layers_per_block=1,
    )  # fmt: skip
    images = ImageSet(DataSettings.of(request.data, on_error=request.on_error), shape, request.images)
    network = Features(request.features, resolve_device(request.device), request.features_file)
    path = request.out or cache_path(Path(request.data), full_provenance(images.provenance(), network))
    if path.is_file():
        say(f"{path} is there already")
    found = reference_statistics(path, images, network, say=say)
    say(
        f"{path}: {found.statistics.count:,} images, {network.dim} features of {network.name}, {len(found.rows):,} kept"
    )
    return found
