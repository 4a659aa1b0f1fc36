"""`tarflow reference`: compute the statistics of a data set once, ahead of the evaluations that use them."""

import io
from dataclasses import dataclass
from pathlib import Path

from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.storage.access import address
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.log import Log
from tarflow.evaluation.networks.features import Features
from tarflow.evaluation.references.compute import reference_statistics
from tarflow.evaluation.references.reference import Reference, cache_path, full_provenance
from tarflow.evaluation.samples.weights_source import resolve_device
from tarflow.files import write_atomic, write_new
from tarflow.models.config import TarFlowConfig
from tarflow.npz import write_npz


@dataclass
class ReferenceRequest:
    """Which statistics to compute."""

    data: str
    size: int
    channels: int
    images: int  # spread evenly over the data; 0 = all
    features: str
    features_file: Path | None
    out: Path | None  # None = beside the data
    on_error: str
    device: str
    max_pixels: int = MAX_PIXELS
    form: str = "tarflow"  # of `out`; "pytorch-fid": mean and covariance alone


def make_reference(request: ReferenceRequest, log: Log = print) -> Reference:
    """Compute statistics together with any other workers, or load them if they exist."""
    # Only the shape of the images is used; the rest of the model is a placeholder.
    shape = TarFlowConfig(
        image_size=request.size, patch_size=request.size, in_channels=request.channels, channels=64, num_blocks=1,
        layers_per_block=1,
    )  # fmt: skip
    images = ImageSet(_data(request), shape, request.images)
    network = Features(request.features, resolve_device(request.device), request.features_file)
    if request.out is None and address(request.data):
        raise EvaluationError(f"{request.data} is an address, which cannot be written to: give --out FILE")
    export = request.out if request.form != "tarflow" else None
    if request.form != "tarflow" and export is None:
        raise EvaluationError(f"--format {request.form} needs --out FILE.npz")
    own = None if export else request.out
    if export is not None and (problem := _no_place_for(export)):
        raise EvaluationError(problem)
    path = own or cache_path(Path(request.data), full_provenance(images.provenance(), network))
    if path.is_file():
        log(f"{path} exists already")
    if path.is_dir():
        raise EvaluationError(f"--out {path} is a folder: name the file to write")
    found = reference_statistics(path, images, network, log=log, ours=own is None)
    log(
        f"{path}: {found.statistics.count:,} images, {network.dim} features of {network.name}, {len(found.rows):,} kept"
    )
    if export is not None:
        write_moments(export, found)
        log(f"{export}: their mean and covariance alone, as pytorch-fid stores them (mu, sigma)")
    return found


def _no_place_for(export: Path) -> str:
    """Why an exported file cannot be written there; empty if it can."""
    if export.suffix != ".npz":
        return f"--out {export}: a file in the form of pytorch-fid ends in .npz"
    if export.exists():
        return f"--out {export} is there already: name a new file"
    return "" if export.absolute().parent.is_dir() else f"--out {export}: there is no folder {export.parent}"


def write_moments(path: Path, reference: Reference) -> None:
    """Write mu [d] and sigma [d, d], the unbiased covariance, in float64."""
    count, mean, scatter = reference.statistics.parts()

    content = io.BytesIO()
    write_npz(content, {"mu": mean.numpy(), "sigma": (scatter / (count - 1)).numpy()}, sealed=False)
    write_atomic(path, lambda temporary: write_new(temporary, content.getvalue()))


def _data(request: ReferenceRequest) -> DataSettings:
    return DataSettings.of(request.data, on_error=request.on_error, max_image_pixels=request.max_pixels)
