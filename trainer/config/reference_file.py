"""Files of reference statistics: their contents, and the only loader.

A run checks the file that its settings name, evaluations compare samples with it. It holds uncompressed numpy arrays, and a
provenance in JSON: which images and which feature network the statistics come from.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from tarflow.image_size import parse_size, plain, sides
from tarflow.npz import read_npz
from tarflow.records import DamagedFileError, Record, as_record, parse_object
from tarflow.trainer.config.foreign_reference import ForeignReference, read_foreign

FORMAT = 2
WHAT = "reference statistics"
WAY_OUT = "name another file (--reference, evaluation.reference), or make one with `tarflow reference`"
_NAMES = {"format", "count", "mean", "scatter", "rows", "provenance"}
_SPATIAL = {
    "spatial_mean",
    "spatial_scatter",
}  # not in files of networks without spatial features, and of earlier versions
_ROUNDING = 1e-6  # generous for products of sums in float64
Text = Annotated[str, Field(max_length=10_000)]


def _size(value: int | str) -> int | str:
    """As `image_size.plain` writes it, within bounds."""
    size = parse_size(value)
    if plain(size) != value or not all(1 <= side <= 1 << 14 for side in sides(size)):
        raise ValueError(f"{str(value)[:80]!r} is neither a square's number of pixels nor a rectangle's HEIGHT,WIDTH")
    return value


class _Provenance(Record):
    """What the statistics were computed from. Later versions may add fields; then those must agree, too."""

    model_config = ConfigDict(extra="allow")

    fingerprint: str = Field(min_length=1, max_length=200)
    images: int = Field(ge=1, lt=1 << 53)
    image_size: Annotated[int | str, AfterValidator(_size)]
    channels: int = Field(ge=1, le=4)
    features: str = Field(min_length=1, max_length=200)
    features_sha256: str = Field(min_length=1, max_length=200)
    preprocessing: Text

    @model_validator(mode="after")
    def _plain(self) -> "_Provenance":
        for key, value in (self.model_extra or {}).items():
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise ValueError(f"{key} is neither text nor a number")
        return self


@dataclass(frozen=True)
class ReferenceFile:
    """Statistics as stored, of `count` images with `d` features."""

    provenance: dict[str, str | int]
    count: int
    mean: NDArray[np.float64]  # [d]
    scatter: NDArray[np.float64]  # [d, d]: sum of (x - mean)(x - mean)^T
    rows: NDArray[np.float32]  # [m, d]: features of m images
    hashes: NDArray[np.uint64] | None  # [count]: of the pixels
    spatial: tuple[NDArray[np.float64], NDArray[np.float64]] | None  # mean [e] and scatter [e, e] of spatial features
    checked: bool  # against a checksum in the file


def read_reference(path: Path, least: int = 2) -> ReferenceFile | ForeignReference:
    """Read statistics of at least `least` images, in the form of `tarflow reference` or in that of other programs.

    Raises:
        DamagedFileError: not a file of statistics, or a checksum, shape or value in it is wrong.
        OSError: it is missing or unreadable.

    """
    try:
        if (theirs := read_foreign(path, what=WHAT, way_out=WAY_OUT)) is not None:
            return theirs
    except DamagedFileError:
        raise
    except ValueError as error:
        raise DamagedFileError(path, str(error), WAY_OUT, what=WHAT) from None
    found = read_npz(path, what=WHAT, way_out=WAY_OUT)
    try:
        return _as_reference(found.arrays, found.checked, least)
    except ValueError as error:
        raise DamagedFileError(path, str(error), WAY_OUT, what=WHAT) from None


def _as_reference(arrays: dict[str, NDArray[Any]], checked: bool, least: int) -> ReferenceFile:
    wanted = _NAMES | (_SPATIAL if arrays.keys() & _SPATIAL else set())
    if odd := sorted((arrays.keys() - {"hashes"}) ^ wanted):
        raise ValueError(f"{'no array' if odd[0] in wanted else 'an unknown array'} {odd[0]!r} stands in it")
    version, count = _number(arrays, "format"), _number(arrays, "count")
    if version != FORMAT:
        raise ValueError(f"it has format {version}, this program reads {FORMAT}")
    if arrays["provenance"].dtype.kind != "U" or arrays["provenance"].shape != ():
        raise ValueError("its provenance is not text")
    provenance = as_record(parse_object(str(arrays["provenance"]).encode("utf-8", "surrogatepass")), _Provenance)
    if not least <= count <= provenance.images:
        raise ValueError(f"it is of {count:,} images: {least:,} to {provenance.images:,} can be")
    dim = arrays["mean"].size
    if not dim:
        raise ValueError("it is of no features")
    kept = len(arrays["rows"]) if arrays["rows"].ndim else 0
    _check(arrays, "mean", np.float64, (dim,))
    _check(arrays, "scatter", np.float64, (dim, dim))
    _check(arrays, "rows", np.float32, (min(kept, count), dim))
    spatial = (arrays["spatial_mean"], arrays["spatial_scatter"]) if arrays.keys() & _SPATIAL else None
    if spatial is not None:
        width = spatial[0].size
        _check(arrays, "spatial_mean", np.float64, (width,))
        _check(arrays, "spatial_scatter", np.float64, (width, width))
    if "hashes" in arrays:
        _check(arrays, "hashes", np.uint64, (count,))
    if count:  # without images there is no mean
        _check_values(arrays, "mean", "scatter", "rows")
        if spatial is not None:
            _check_values(arrays, "spatial_mean", "spatial_scatter")
    large = {name: arrays[name] for name in ("mean", "scatter", "rows")}
    return ReferenceFile(
        provenance.model_dump(), count, **large, hashes=arrays.get("hashes"), spatial=spatial, checked=checked
    )


def _number(arrays: dict[str, NDArray[Any]], name: str) -> int:
    _check(arrays, name, np.int64, ())
    return int(arrays[name])


def _check(arrays: dict[str, NDArray[Any]], name: str, dtype: type, shape: tuple[int, ...]) -> None:
    array = arrays[name]
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"its array {name!r} is {array.dtype} {list(array.shape)}, not {np.dtype(dtype)} {list(shape)}"
        )


def _check_values(arrays: dict[str, NDArray[Any]], mean: str, scatter_name: str, *more: str) -> None:
    """All values are finite, and the scatter matrix is symmetric with entries within the Cauchy-Schwarz bound."""
    for name in (mean, scatter_name, *more):
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"its array {name!r} holds values that are not finite")
    scatter = arrays[scatter_name]
    own = np.diagonal(scatter)
    if (own < 0).any():
        raise ValueError("its scatter matrix has negative sums of squares")
    most = np.sqrt(own[:, None] * own) * (1 + _ROUNDING) + _ROUNDING * float(own.max())
    if (np.abs(scatter) > most).any() or (np.abs(scatter - scatter.T) > _ROUNDING * most).any():
        raise ValueError("its scatter matrix is not one: it is not symmetric, or has entries that no features can have")
