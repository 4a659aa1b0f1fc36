"""Reads .npz files as the description of the format says, without numpy's reader and without ours.

A zip archive of members NAME.npy; each begins with the bytes 93 4E 55 4D 50 59, a version, the length of a header in ASCII
(a Python literal with descr, fortran_order and shape, padded with spaces so that the data begins at a multiple of 64), and
goes on with the elements in C order.
"""

import ast
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

CODES = {"|u1": "B", "<f8": "d", "<f4": "f", "<i8": "q"}
Plain = tuple[str, tuple[int, ...], tuple[Any, ...]]


def arrays_by_the_format(path: Path) -> dict[str, Plain]:
    """Name -> (type, shape, elements in C order)."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name.removesuffix(".npy"): _array(archive.read(name)) for name in archive.namelist()}


def _array(data: bytes) -> Plain:
    assert data[:6] == b"\x93NUMPY"
    assert data[6:8] == b"\x01\x00"
    (length,) = struct.unpack("<H", data[8:10])
    assert (10 + length) % 64 == 0
    header = ast.literal_eval(data[10 : 10 + length].decode("ascii"))
    assert header.keys() == {"descr", "fortran_order", "shape"}
    assert header["fortran_order"] is False
    number = math.prod(header["shape"])
    elements = struct.unpack(f"<{number}{CODES[header['descr']]}", data[10 + length :])
    return header["descr"], header["shape"], elements
