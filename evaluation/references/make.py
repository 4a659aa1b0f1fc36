"""`tarflow reference`: compute the statistics of a data set once, ahead of the evaluations that use them."""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.storage.access import address
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.array import write_array
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.log import Log
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics
from tarflow.evaluation.metrics.names import FID_NETWORK
from tarflow.evaluation.networks.features import Features
from tarflow.evaluation.references.compute import reference_statistics
from tarflow.evaluation.references.reference import Reference, cache_path, full_provenance
from tarflow.evaluation.samples.weights_source import resolve_device
from tarflow.files import write_atomic, write_new
from tarflow.image_size import Size, sides
from tarflow.models.config import TarFlowConfig
from tarflow.npz import write_npz

OURS = "tarflow"
# Other programs' forms, and what is in a file.
FORMS = {
    "pytorch-fid": "their mean and covariance alone, as pytorch-fid stores them (mu, sigma)",
    "adm": "their mean and covariance, also of the spatial features, as ADM stores them (mu, sigma, mu_s, sigma_s)",
}


@dataclass
class ReferenceRequest:
    """Which statistics to compute."""

    data: str
    size: Size
    channels: int
    images: int  # spread evenly over the data; 0 = all
    features: str
    features_file: Path | None
    out: Path | None  # None = beside the data
    on_error: str
    device: str
    max_pixels: int = MAX_PIXELS
    crop: str | None = None  # as data.crop
    form: str = OURS  # of `out`, or one of `FORMS`
    with_images: int = 0  # images in a file of ADM's form, spread evenly over the data


def make_reference(request: ReferenceRequest, log: Log = print) -> Reference:
    """Compute statistics together with any other workers, or load them if they exist."""
    # Only the shape of the images is used; the rest of the model is a placeholder.
    shape = TarFlowConfig(
        image_size=request.size, patch_size=math.gcd(*sides(request.size)), in_channels=request.channels, channels=64,
        num_blocks=1, layers_per_block=1,
    )  # fmt: skip
    images = ImageSet(_data(request), shape, request.images)
    network = Features(request.features, resolve_device(request.device), request.features_file)
    if request.out is None and address(request.data):
        raise EvaluationError(f"{request.data} is an address, which cannot be written to: give --out FILE")
    if problem := _problem_of_form(request, network, images.num_images):
        raise EvaluationError(problem)
    own = request.out if request.form == OURS else None
    path = own or cache_path(Path(request.data), full_provenance(images.provenance(), network))
    if path.is_file():
        log(f"{path} exists already")
    if path.is_dir():
        raise EvaluationError(f"--out {path} is a folder: name the file to write")
    found = reference_statistics(path, images, network, log=log, ours=own is None)
    log(
        f"{path}: {found.statistics.count:,} images, {network.dim} features of {network.name}, {len(found.rows):,} kept"
    )
    if request.form != OURS:
        _export(request, found, shape)
        log(f"{request.out}: {FORMS[request.form]}; the form does not name the network, which is {network.name}")
    return found


def _problem_of_form(request: ReferenceRequest, network: Features, images: int) -> str:
    """Why a file in the form of another program cannot be written; empty if it can."""
    out, form = request.out, request.form
    if request.with_images and form != "adm":
        return f"--with-images goes with --format adm, not with {form}: no other form holds images"
    if request.with_images > images:
        return f"--with-images {request.with_images}: the data hold {images:,} images"
    if form == OURS:
        return ""
    if out is None:
        return f"--format {form} needs --out FILE.npz"
    if form == "adm" and network.name.partition("-")[0] != FID_NETWORK:
        return f"--format adm is of the features of {FID_NETWORK}, not of {network.name}: give --features {FID_NETWORK}"
    if out.suffix != ".npz":
        return f"--out {out}: a file in the form of {form} ends in .npz"
    if out.exists():
        return f"--out {out} is there already: name a new file"
    return "" if out.absolute().parent.is_dir() else f"--out {out}: there is no folder {out.parent}"


def _export(request: ReferenceRequest, reference: Reference, shape: TarFlowConfig) -> None:
    """Write mean [d] and unbiased covariance [d, d] in float64, for ADM also of the spatial features, and images if asked."""
    assert request.out is not None
    arrays = moments_of(reference.statistics)
    if request.form == "adm":
        if reference.spatial is None:
            raise EvaluationError(
                f"{reference.path} holds no statistics of spatial features, which --format adm needs: it was written by an "
                "earlier version; move it away, and it is computed again with them"
            )
        arrays |= moments_of(reference.spatial, "_s")
    if request.with_images:
        inside = ImageSet(_data(request), shape, request.with_images)
        number = request.with_images
        if inside.skips_damaged:  # the file begins with the number of its images
            number = sum(len(pixels) for pixels, _, _ in inside.batches(labelled=False))
        pictures = (image for pixels, _, _ in inside.batches(labelled=False) for image in pixels)
        write_array(request.out, (number, *sides(request.size), 3), pictures, arrays)
        return
    content = io.BytesIO()
    write_npz(content, arrays, sealed=False)
    write_atomic(request.out, lambda temporary: write_new(temporary, content.getvalue()))


def moments_of(statistics: FeatureStatistics, suffix: str = "") -> dict[str, NDArray[np.float64]]:
    """`mu` [d] and `sigma` [d, d], the unbiased covariance, under names that end in `suffix`."""
    count, mean, scatter = statistics.parts()
    return {f"mu{suffix}": mean.numpy(), f"sigma{suffix}": (scatter / (count - 1)).numpy()}


def _data(request: ReferenceRequest) -> DataSettings:
    return DataSettings.of(
        request.data, on_error=request.on_error, max_image_pixels=request.max_pixels, crop=request.crop
    )
