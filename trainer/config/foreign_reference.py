"""Reference statistics that other programs wrote: mean and covariance of the FID Inception's 2,048 features.

| form | file | holds | written by |
|---|---|---|---|
| `adm` | .npz | mu, sigma, mu_s, sigma_s, perhaps arr_0 | the evaluator of guided-diffusion (ADM) |
| `pytorch-fid` | .npz | mu, sigma | pytorch-fid, EDM |
| `clean-fid` | NAME_MODE_SPLIT_SIZE.npz | mu, sigma | clean-fid, which has three modes of resizing |
| `torch-fidelity` | .pt | {"mu", "sigma"} | torch-fidelity's cache, through torch.save |
| `torchmetrics` | .pth | the state of FrechetInceptionDistance | the published code of TarFlow |
| `edm2` | .pkl | {"fid": {"mu", "sigma"}, ...} | EDM2 |

mu_s and sigma_s are of the 2,023 spatial features, which sFID compares. No file says which images it is of or how they were
cropped, and only torchmetrics says how many. Which rule resized them to 299 pixels follows from the program; two rules are
possible where two programs write the same form. Nothing in a pickle is run (`tarflow.data_pipeline.array_pickles`).
"""

import errno
import hashlib
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.array_pickles import FLOATS, NotArraysError, unpickled
from tarflow.files import open_to_read, read_up_to
from tarflow.image_size import plain, size_of
from tarflow.npz import Declared, declared, read_npz

# One set of weights, three rules of resizing: TensorFlow's, pytorch-fid's, clean-fid's.
NETWORK, PYTORCH_NETWORK, CLEAN_NETWORK = "fid_inception", "fid_inception_pytorch", "fid_inception_clean"
PICKLES, TORCH, STATE = (".pkl", ".pickle"), (".pt",), (".pth",)
MOST_BYTES = 1 << 30  # of a pickle
IMAGES = "arr_0"  # the images themselves, which ADM's files may hold, too
_MOMENTS, _SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")
_SUMS = tuple(f"real_features_{name}" for name in ("sum", "cov_sum", "num_samples"))
_TOLERANCE = 1e-3  # asymmetry of a covariance that was computed or stored in float32, relative to its diagonal
_OF_CLEAN_FID = re.compile(r".+_(clean|legacy_tensorflow|legacy_pytorch)(_clip_vit_b_32)?_[^_]+_(\d+|na)\.npz")
_NETWORKS = {
    "adm": (NETWORK,),
    "pytorch-fid": (NETWORK, PYTORCH_NETWORK),
    "torch-fidelity": (NETWORK,),
    "torchmetrics": (NETWORK,),
    "edm2": (NETWORK,),
    "clean-fid, clean": (CLEAN_NETWORK,),
    "clean-fid, legacy_tensorflow": (NETWORK,),
    "clean-fid, legacy_pytorch": (PYTORCH_NETWORK,),
}


@dataclass(frozen=True)
class Moments:
    """Mean [d], and covariance [d, d] made exactly symmetric, in float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


@dataclass(frozen=True)
class ForeignReference:
    """Statistics in another program's form: what it does not record is not in `provenance`."""

    provenance: dict[str, str | int]
    networks: tuple[str, ...]  # that they can be of
    mean: NDArray[np.float64]  # [d]
    covariance: NDArray[np.float64]  # [d, d]
    spatial: Moments | None = None
    count: int | None = None  # images; None: not recorded


def read_foreign(path: Path, *, what: str, way_out: str) -> ForeignReference | None:
    """The statistics in a file of one of these forms; None for any other .npz file.

    Raises ValueError for what are no statistics, DamagedFileError for what is no .npz file, OSError.
    """
    inside: dict[str, str | int] = {}
    count: int | None = None
    arrays: Mapping[str, NDArray[Any]]
    if path.suffix in PICKLES:
        form, arrays = "edm2", _in_pickle(_bytes_of(path))
    elif path.suffix in TORCH:
        form, arrays = "torch-fidelity", _in_pickle(_pickle_of_torch(path))
    elif path.suffix in STATE:
        form, (arrays, count) = "torchmetrics", _in_state(path)
    else:
        found = declared(path, what=what, way_out=way_out)
        names = found.keys() - {IMAGES}
        if names not in ({*_MOMENTS}, {*_MOMENTS, *_SPATIAL}):
            return None
        form, inside = _form_of(path, len(names) == 4), _images_inside(found)
        arrays = read_npz(path, names=names, what=what, way_out=way_out).arrays
    own = moments(arrays["mu"], arrays["sigma"])
    spatial = moments(arrays["mu_s"], arrays["sigma_s"], _SPATIAL) if "mu_s" in arrays else None
    with open_to_read(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    networks = _NETWORKS[form]
    about: dict[str, str | int] = {"form": form, "features": " or ".join(networks), "file_sha256": digest}
    return ForeignReference(about | inside, networks, own.mean, own.covariance, spatial, count)


def _form_of(path: Path, spatial: bool) -> str:
    """Of an .npz file. The files of clean-fid are those of pytorch-fid but for their names, which say how it resized."""
    if spatial:
        return "adm"
    named = _OF_CLEAN_FID.fullmatch(path.name)
    if named is None:
        return "pytorch-fid"
    if named[2]:
        raise ValueError("its name says that clean-fid made it with CLIP: no such feature network is here")
    return f"clean-fid, {named[1]}"


def _images_inside(found: Mapping[str, Declared]) -> dict[str, str | int]:
    """Number and size of the images that a file of ADM holds beside the statistics, which are of more than these."""
    images = found.get(IMAGES)
    if images is None:
        return {}
    if images.dtype != np.uint8 or len(images.shape) != 4:
        raise ValueError(f"its {IMAGES} is {images.dtype} {list(images.shape)}, not uint8 [images, height, width, 3]")
    return {"image_size": plain(size_of(*images.shape[1:3])), "images_inside": images.shape[0]}


def moments(mean: NDArray[Any], covariance: NDArray[Any], names: tuple[str, str] = ("mu", "sigma")) -> Moments:
    """Mean [d] and covariance [d, d] of any float type. Raises ValueError, by their `names`, if they are none."""
    first, second = names
    if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"{first} {list(mean.shape)} and {second} {list(covariance.shape)} are not a mean and a covariance"
        )
    for name, array in ((first, mean), (second, covariance)):
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"its {name} is {array.dtype}, or holds values that are not finite")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    variances = np.diagonal(covariance)
    if (variances < 0).any() or np.abs(covariance - covariance.T).max() > _TOLERANCE * variances.max():
        raise ValueError(f"its {second} is not a covariance: it is not symmetric, or has negative variances")
    return Moments(mean, (covariance + covariance.T) / 2)


def _bytes_of(path: Path) -> bytes:
    data = read_up_to(path, MOST_BYTES)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return data


def _pickle_of_torch(path: Path) -> bytes:
    """The pickle in a file of torch.save, which is a zip archive of uncompressed members."""
    try:
        with open_to_read(path) as file, zipfile.ZipFile(file) as archive:
            (member,) = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > MOST_BYTES:
                raise ValueError("its pickle is compressed, or too large")
            return archive.read(member)
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise
        raise ValueError("it is no file of torch.save: its directory points outside the file") from None
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"it is no file of torch.save: {error}") from None


def _in_state(path: Path) -> tuple[dict[str, NDArray[Any]], int]:
    """Mu and sigma, and the number of images, from the sums that torchmetrics keeps of the real images."""
    from tarflow.models.formats.tensor_files import read_pickled  # loads torch

    tensors = read_pickled(path).tensors
    if missing := [name for name in _SUMS if name not in tensors]:
        raise ValueError(f"it is no state of torchmetrics' FrechetInceptionDistance: {missing[0]} is missing")
    total, products, number = (tensors[name].numpy() for name in _SUMS)
    if total.dtype != np.float64 or number.dtype != np.int64 or number.shape != () or number < 2:
        raise ValueError("it is no state of torchmetrics' FrechetInceptionDistance with two images or more")
    if total.ndim != 1 or products.dtype != np.float64 or products.shape != (total.size, total.size):
        raise ValueError(f"{_SUMS[0]} {list(total.shape)} and {_SUMS[1]} {list(products.shape)} do not fit together")
    count = int(number)
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / (count - 1)
    # A variance of zero may come out as a rounding below it.
    np.fill_diagonal(covariance, np.maximum(np.diagonal(covariance), 0))
    return {"mu": mean, "sigma": covariance}, count


def _in_pickle(data: bytes) -> dict[str, NDArray[Any]]:
    """Mu and sigma. Raises ValueError for anything but dictionaries of arrays."""
    try:
        found = unpickled(data, FLOATS)
        part = found["fid"] if isinstance(found, dict) and "fid" in found else found
        return {name: part[name].array for name in _MOMENTS}
    except (NotArraysError, KeyError, TypeError, AttributeError):
        raise ValueError(
            'it is no pickle of {"mu": array, "sigma": array}, or of {"fid": {"mu": array, "sigma": array}}'
        ) from None
