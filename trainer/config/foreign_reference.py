"""Reference statistics that other programs wrote: mean and covariance of the FID Inception's 2,048 features.

| form | file | holds | written by |
|---|---|---|---|
| `adm` | .npz | mu, sigma, mu_s, sigma_s, perhaps arr_0 | the evaluator of guided-diffusion (ADM) |
| `pytorch-fid` | .npz | mu, sigma | pytorch-fid, EDM; clean-fid, whose resize is another one |
| `edm2` | .pkl | {"fid": {"mu", "sigma"}, ...} | EDM2 |

None of them says which images it is of, how many, or how they were cropped. Pickles are read without running anything in
them: the names of numpy's constructors stand for plain containers here, and any other name is refused.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.files import open_to_read
from tarflow.npz import Declared

NETWORK = "fid_inception"
MOST_BYTES = 1 << 30  # of a pickle
_ADM, _PLAIN = frozenset({"mu", "sigma", "mu_s", "sigma_s"}), frozenset({"mu", "sigma"})
_IMAGES = "arr_0"  # the images themselves, which ADM's files may hold, too
_TOLERANCE = 1e-3  # asymmetry of a covariance that was computed or stored in float32, relative to its diagonal
Moments = tuple[str, NDArray[np.float64], NDArray[np.float64]]


def form_of(found: Mapping[str, Declared]) -> str | None:
    """`adm` or `pytorch-fid` by the arrays of an .npz file; None for any other."""
    names = found.keys() - {_IMAGES}
    return "adm" if names == _ADM else "pytorch-fid" if names == _PLAIN else None


def moments(mean: NDArray[Any], covariance: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [d] and covariance [d, d] in float64, the latter made exactly symmetric. Raises ValueError if they are none."""
    if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
        raise ValueError(f"mu {list(mean.shape)} and sigma {list(covariance.shape)} are not a mean and a covariance")
    for name, array in (("mu", mean), ("sigma", covariance)):
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"its {name} is {array.dtype}, or holds values that are not finite")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    variances = np.diagonal(covariance)
    if (variances < 0).any() or np.abs(covariance - covariance.T).max() > _TOLERANCE * variances.max():
        raise ValueError("its sigma is not a covariance: it is not symmetric, or has negative variances")
    return mean, (covariance + covariance.T) / 2


def read_pickle(path: Path) -> Moments:
    """The statistics of EDM2's pickles. Raises ValueError for anything but dictionaries of arrays, OSError."""
    with open_to_read(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    try:
        found = _Unpickler(io.BytesIO(data)).load()
        part = found["fid"] if isinstance(found, dict) and "fid" in found else found
        mean, covariance = (part[name].array for name in ("mu", "sigma"))
    except ValueError:
        raise
    # What a pickle of other things, or a damaged one, makes the machine of pickles raise.
    except (
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        MemoryError,
    ):
        raise ValueError('it is no pickle of {"fid": {"mu": array, "sigma": array}}') from None
    return "edm2", *moments(mean, covariance)


class _Type:
    """In the place of numpy.dtype: a code, and an order of bytes."""

    def __init__(self, code: object = "", *_: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        if self.code not in ("f4", "f8") or self.order not in ("<", ">", "="):
            raise ValueError(f"its arrays are of {self.code!r}, not of floats")
        return np.dtype(f"{self.order}{self.code}")


class _Array:
    """In the place of numpy.ndarray: what its state says, checked, and nothing allocated before."""

    array: NDArray[Any]

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, in_fortran_order, raw = state
        self.fill(raw, kind, shape, "F" if in_fortran_order else "C")

    def fill(self, raw: object, kind: object, shape: object, order: object) -> None:
        if not isinstance(kind, _Type) or not isinstance(raw, bytes | bytearray) or not isinstance(shape, tuple):
            raise ValueError("an array in it is not one")
        if not all(isinstance(size, int) for size in shape):
            raise ValueError("an array in it has no shape")
        self.array = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if order == "F" else "C")


def _from_buffer(raw: object, kind: object, shape: object, order: object) -> _Array:
    """In the place of numpy's function of that name, by which pickles of protocol 5 hold arrays."""
    found = _Array()
    found.fill(raw, kind, shape, order)
    return found


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """In the place of codecs.encode: pickles of before protocol 3 hold bytes as text."""
    if encoding != "latin1":
        raise ValueError(f"its bytes are encoded in {encoding!r:.40}")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encoded,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    """Knows dictionaries, text, numbers and arrays."""

    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module, name))
        if found is None:
            raise ValueError(f"it asks for {f'{module}.{name}'[:200]}, which could run code: only arrays are read")
        return found
