"""The file of a chunk: arrays with a checksum, the chunk's identity, and who computed it.

It is a cache. A file that is damaged, or of another chunk, checkpoint or recipe, is computed again and never merged.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tarflow.npz import read_npz, write_npz
from tarflow.records import DamagedFileError, Record, as_record, parse_object

WHAT = "a chunk of an evaluation"
WAY_OUT = "start the command again, and it is computed again"
Identity = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """A chunk's file, which need not exist yet, and its identity: run, checkpoint, weights, settings, its own name."""

    path: Path
    identity: Identity


class About(Record):
    """Who computed a chunk and how long it took."""

    by: str = Field("", max_length=300)
    seconds: dict[str, Annotated[float, Field(ge=0, le=1e12)]] = Field(default_factory=dict)
    code: dict[str, Any] | None = None
    batches: dict[str, Annotated[int, Field(gt=0, le=1 << 30)]] = Field(
        default_factory=dict
    )  # stage -> images at a time


# Array -> its dtype and shape: a letter is the same size wherever it occurs, `*` is any size.
Form = dict[str, tuple[type, str]]
SAMPLES: Form = {
    "count": (np.int64, "1"), "mean": (np.float64, "d"), "scatter": (np.float64, "t"),
    "spatial_mean": (np.float64, "u"), "spatial_scatter": (np.float64, "v"),
    "features": (np.float32, "m d"), "pixels": (np.uint8, "p * * *"), "labels": (np.int64, "p"), "hashes": (np.uint64, "n"),
    "lost_sums": (np.int64, "5"), "lost_nonfinite": (np.int64, "l"),
    "lost_redone": (np.int64, "1"), "lost_certified": (np.int64, "e"), "lost_certificate": (np.float64, "e k"),
    "grid_seen": (np.int64, "s"), "grid_index": (np.int64, "g"),
    "grid_images": (np.uint8, "g c h w"), "grid_noisy": (np.uint8, "g c h w"),
}  # fmt: skip
LIKELIHOOD: Form = {"ids": (np.int64, "n"), "values": (np.float64, "n k"), "dims": (np.int64, "1")}
_GRID = {"grid_images", "grid_noisy"}  # missing where no sample is in the grid
_SPATIAL = {"spatial_mean", "spatial_scatter"}  # missing where the network has no spatial features
_LATER = {"lost_redone", "lost_certified", "lost_certificate"}  # earlier versions wrote none of them


def write_chunk(chunk: Chunk, about: dict[str, Any], **arrays: NDArray[Any]) -> None:
    """Write a chunk's arrays."""
    header = {"of": chunk.identity, "about": about}
    with open(chunk.path, "wb") as file:
        write_npz(file, {**arrays, "said": np.array(json.dumps(header, sort_keys=True))})


def read_chunk(chunk: Chunk, form: Form) -> tuple[dict[str, NDArray[Any]], About]:
    """A chunk's arrays and who computed it.

    Raises DamagedFileError for a file without a matching checksum, of another identity, or with other arrays.
    """
    found = read_npz(chunk.path, what=WHAT, way_out=WAY_OUT)
    try:
        if not found.checked:
            raise ValueError("it carries no checksum")
        header = parse_object(str(found.arrays.pop("said", "")).encode("utf-8", "surrogatepass"))
        if header.get("of") != json.loads(json.dumps(chunk.identity)):
            raise ValueError("it belongs to another chunk, or to other weights or settings")
        about = as_record(_object(header.get("about")), About)
        _check_arrays(found.arrays, form)
        if form is SAMPLES:
            _check_samples(found.arrays)
    except ValueError as error:
        raise DamagedFileError(chunk.path, str(error), WAY_OUT, what=WHAT) from None
    return found.arrays, about


def is_valid(chunk: Chunk, form: Form) -> bool:
    """Whether a chunk's file can be merged."""
    try:
        read_chunk(chunk, form)
    except (DamagedFileError, FileNotFoundError):  # gone: the result is published, and its chunks were removed
        return False
    return True


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it does not say who computed it")
    return value


def _check_arrays(arrays: dict[str, NDArray[Any]], form: Form) -> None:
    if odd := sorted((arrays.keys() ^ form.keys()) - _GRID - _SPATIAL - _LATER):
        raise ValueError(f"{'it lacks the array' if odd[0] in form else 'it has an unknown array'} {odd[0]!r}")
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        dtype, letters = form[name]
        axes = letters.split()
        fits = array.dtype == dtype and array.ndim == len(axes)
        for letter, size in zip(axes, array.shape):
            wanted = int(letter) if letter.isdigit() else size if letter == "*" else sizes.setdefault(letter, size)
            fits = fits and size == wanted
        if not fits:
            raise ValueError(
                f"its array {name!r} is {array.dtype} {list(array.shape)}, which does not match the others"
            )


def _check_samples(arrays: dict[str, NDArray[Any]]) -> None:
    count = int(arrays["count"][0])
    if len(arrays.keys() & _SPATIAL) not in (0, len(_SPATIAL)):
        raise ValueError("its spatial statistics are incomplete")
    for mean, scatter in (("mean", "scatter"), ("spatial_mean", "spatial_scatter")):
        dim = len(arrays.get(mean, ()))
        if len(arrays.get(scatter, ())) != dim * (dim + 1) // 2:
            raise ValueError("its scatter matrix and its mean have different widths")
    if not len(arrays["features"]) <= len(arrays["hashes"]) == count or len(arrays["pixels"]) > count:
        raise ValueError(f"its arrays do not match its {count} samples")
    asked, used, *_ = arrays["lost_sums"].tolist()
    if used != count or asked != used + len(arrays["lost_nonfinite"]) or (arrays["lost_sums"] < 0).any():
        raise ValueError("its numbers of samples contradict each other")
    if len(arrays.keys() & _LATER) not in (0, len(_LATER)):
        raise ValueError("its certificates are incomplete")
    if len(arrays["grid_index"]) and not arrays.keys() >= _GRID:
        raise ValueError("the images of its grid are missing")
    if count and not all(
        np.isfinite(arrays[name]).all() for name in ("mean", "scatter", "features", *(_SPATIAL & arrays.keys()))
    ):
        raise ValueError("it holds features that are not finite")
