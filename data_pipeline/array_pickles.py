"""Pickles of dictionaries, lists, text, numbers and numpy arrays, read without running anything in them.

The names of numpy's constructors stand for plain containers here, and any other name is refused: what would be called could
be anything.
"""

import io
import pickle
import pickletools
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

FLOATS = ("floats", frozenset({"f4", "f8"}))
NUMBERS = ("numbers", frozenset({"f4", "f8", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8))}))
Allowed = tuple[str, frozenset[str]]  # what arrays may be of: in a word, and numpy's codes


class NotArraysError(ValueError):
    """Bytes that are no pickle at all, or a damaged one."""


def unpickled(data: bytes, allowed: Allowed) -> Any:
    """The object in a pickle, with a `PickledArray` for every array; of Python 2 too, whose strings are text.

    Raises NotArraysError for what is no such pickle, ValueError for other objects and for arrays of anything not `allowed`.
    """
    try:
        # The machine makes room for as many objects as the largest number says that one is put under.
        for operation, number, _ in pickletools.genops(data):
            if operation.name in ("PUT", "LONG_BINPUT") and number is not None and number > len(data):
                raise ValueError("it numbers more objects than it can hold")
        return _Unpickler(data, allowed).load()
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
        raise NotArraysError("it is no pickle of arrays, or a damaged one") from None


class _Type:
    """In the place of numpy.dtype: a code, and an order of bytes."""

    allowed: ClassVar[Allowed] = FLOATS

    def __init__(self, code: object = "", *_: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        word, codes = self.allowed
        if self.code not in codes or self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"its arrays are of {self.code!r}, not of {word}")
        return np.dtype(f"{self.order}{self.code}")


class PickledArray:
    """In the place of numpy.ndarray: what its state says, checked, and nothing allocated before."""

    array: NDArray[Any]

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, in_fortran_order, raw = state
        self.fill(raw, kind, shape, "F" if in_fortran_order else "C")

    def fill(self, raw: object, kind: object, shape: object, order: object) -> None:
        """Take the values, which are not copied. Raises ValueError."""
        raw = _latin1(raw) if isinstance(raw, str) else raw
        if not isinstance(kind, _Type) or not isinstance(raw, bytes | bytearray) or not isinstance(shape, tuple):
            raise ValueError("an array in it is not one")
        if not all(isinstance(size, int) for size in shape):
            raise ValueError("an array in it has no shape")
        self.array = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if order == "F" else "C")


def _from_buffer(raw: object, kind: object, shape: object, order: object) -> PickledArray:
    """In the place of numpy's function of that name, by which pickles of protocol 5 hold arrays."""
    found = PickledArray()
    found.fill(raw, kind, shape, order)
    return found


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """In the place of codecs.encode: pickles of before protocol 3 hold bytes as text."""
    if encoding != "latin1":
        raise ValueError(f"its bytes are encoded in {encoding!r:.40}")
    return _latin1(text)


def _latin1(text: str) -> bytes:
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Knows dictionaries, lists, text, numbers and arrays."""

    def __init__(self, data: bytes, allowed: Allowed) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._names: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): PickledArray,
            ("numpy", "dtype"): type("_Type", (_Type,), {"allowed": allowed}),
            ("_codecs", "encode"): _encoded,
            **{(f"numpy.{core}.multiarray", "_reconstruct"): PickledArray for core in ("core", "_core")},
            **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
        }

    def find_class(self, module: str, name: str) -> Any:
        found = self._names.get((module, name))
        if found is None:
            raise ValueError(f"it asks for {f'{module}.{name}'[:200]}, which could run code: only arrays are read")
        return found
