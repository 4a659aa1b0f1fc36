"""Reads `.npz` files, as numpy writes them, that a disk may have damaged or a stranger made.

What a file declares is checked against its directory and a limit before anything is read into memory: no objects (pickles),
no duplicate names, no shape larger than the file. Files written here carry a checksum of all arrays.
"""

import errno
import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tarflow.records import SEAL, DamagedFileError

MOST_ARRAYS = 10_000
_HEADER = 1 << 14  # bytes at the start of a member that hold its type and shape
_MOST_INFLATED = 1032  # largest ratio of deflate
_MOST_EXTRA = 32  # bytes of a member's extra field: holds sizes over 4 GiB
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_KINDS = "?biufcSU"  # numbers and text: no structured types, objects or dates


@dataclass(frozen=True)
class Declared:
    """Type and shape of an array that has not been read yet."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Arrays:
    """The arrays of a file; `checked`: they match its checksum (False: it has none)."""

    arrays: dict[str, NDArray[Any]]
    checked: bool


def declared(path: Path, limit: int | None = None, *, what: str = "", way_out: str = "") -> dict[str, Declared]:
    """Name -> type and shape of every array in a file; reads only the headers.

    `limit`: maximum size of all arrays together in bytes; None: the size of the file, which excludes compression.

    Raises:
        DamagedFileError: not an .npz file, or one that is unsafe to read.
        OSError: it is missing or unreadable.

    """
    with _opened(path, limit, what, way_out) as (_, found):
        return {name: array for name, (_, array) in found.items()}


def read_npz(
    path: Path, limit: int | None = None, names: Collection[str] | None = None, *, what: str = "", way_out: str = ""
) -> Arrays:
    """Read the arrays of a file, or some of them (then the checksum is not verified). Raises as `declared`."""
    with _opened(path, limit, what, way_out) as (archive, found):
        wanted = found if names is None else [name for name in found if name in names]
        arrays = {name: _read(archive, found[name][0]) for name in wanted}
        if names is not None or SEAL not in arrays:
            return Arrays(arrays, checked=False)
        if str(arrays.pop(SEAL)) != checksum(arrays):
            raise ValueError("its checksum does not fit its arrays")
        return Arrays(arrays, checked=True)


def rows(path: Path, name: str, count: int, *, what: str = "", way_out: str = "") -> Iterator[NDArray[Any]]:
    """The array `name` in pieces of `count` along its first axis, for one that memory need not hold. Raises as `declared`."""
    with _opened(path, None, what, way_out) as (archive, found):
        info, array = found[name]
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            if _READERS[version](member)[1]:
                raise ValueError(f"its array {name!r} is stored column by column")
            size = math.prod(array.shape[1:]) * array.dtype.itemsize
            for first in range(0, array.shape[0], count):
                piece = min(count, array.shape[0] - first)
                data = member.read(piece * size)
                if len(data) != piece * size:
                    raise ValueError(f"its array {name!r} ends early")
                yield np.frombuffer(data, array.dtype).reshape(piece, *array.shape[1:])
            if member.read(1):  # at its end its CRC-32 is checked
                raise ValueError(f"{info.filename} goes on beyond its array")


def write_npz(file: BinaryIO, arrays: Mapping[str, NDArray[Any]], sealed: bool = True) -> None:
    """Write arrays with their checksum; the same bytes for the same arrays. Not `sealed`: the arrays alone, for others."""
    np.savez(file, **arrays, **({SEAL: np.array(checksum(arrays))} if sealed else {}))


def checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    """CRC-32 of names, types, shapes and values."""
    crc = 0
    for name in sorted(arrays):
        array = arrays[name]
        crc = zlib.crc32(json.dumps([name, array.dtype.str, array.shape]).encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


Found = dict[str, tuple[zipfile.ZipInfo, Declared]]


@contextmanager
def _opened(path: Path, limit: int | None, what: str, way_out: str) -> Iterator[tuple[zipfile.ZipFile, Found]]:
    def damaged(problem: str) -> DamagedFileError:
        return DamagedFileError(path, problem, way_out, what=what)

    if path.exists() and not path.is_file():
        raise damaged("it is not a regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            size = path.stat().st_size
            yield archive, _directory(archive, size, size if limit is None else limit)
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise
        raise damaged("its directory points outside the file" if error.errno else str(error)) from None
    except DamagedFileError:
        raise
    # What the readers of zip files and numpy headers raise on garbage.
    except (ValueError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, TypeError, RuntimeError) as error:
        raise damaged(str(error) or type(error).__name__) from None


def _directory(archive: zipfile.ZipFile, size: int, limit: int) -> Found:
    members = archive.infolist()
    if len(members) > MOST_ARRAYS:
        raise ValueError(f"it has {len(members):,} members, more than {MOST_ARRAYS:,}")
    total = sum(info.file_size for info in members)
    if total > limit:
        raise ValueError(f"its arrays have {total:,} bytes, more than {limit:,}")
    found: Found = {}
    for info in members:
        name = info.filename.removesuffix(".npy")
        if name == info.filename or not name.isprintable() or name.startswith("/") or {"..", "."} & {*name.split("/")}:
            raise ValueError(f"its member {info.filename[:80]!r} has no name of an array")
        if name in found:
            raise ValueError(f"its array {name!r} stands in it twice")
        if (
            info.comment or len(info.extra) > _MOST_EXTRA
        ):  # numpy writes none: a damaged length would hide members there
            raise ValueError(f"the entry of its array {name!r} is longer than numpy makes it")
        stored = info.compress_type == zipfile.ZIP_STORED
        most = info.compress_size * (1 if stored else _MOST_INFLATED)
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"its array {name!r} is packed in a way that numpy does not write")
        if info.compress_size > size or info.file_size > most:
            raise ValueError(f"its array {name!r} is said to be larger than the file can hold")
        found[name] = info, _declared(archive, info, name)
    return found


def _declared(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Declared:
    with archive.open(info) as member:
        head = io.BytesIO(member.read(_HEADER))  # no more, whatever length the header claims
    version = np.lib.format.read_magic(head)
    if version not in _READERS:
        raise ValueError(f"its array {name!r} has a header of version {version}")
    try:
        shape, _, dtype = _READERS[version](head)
    except Exception:  # noqa: BLE001 -- numpy evaluates it with Python's parser, which garbage can make raise anything
        raise ValueError(f"the header of its array {name!r} cannot be read") from None
    if dtype.hasobject:
        raise ValueError(f"its array {name!r} holds objects, which are pickled: reading them could run code")
    if dtype.kind not in _KINDS or dtype.names or dtype.subdtype or not dtype.itemsize:
        raise ValueError(f"its array {name!r} has the type {str(dtype)[:80]}, which is neither numbers nor text")
    nbytes = dtype.itemsize * math.prod(shape)
    if min(shape, default=0) < 0 or nbytes != info.file_size - head.tell():
        raise ValueError(f"its array {name!r} is said to have the shape {str(shape)[:80]}, which does not fit its size")
    return Declared(dtype, shape, nbytes)


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(info) as member:
        array: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):  # at its end its CRC-32 is checked
            raise ValueError(f"{info.filename} goes on beyond its array")
    return array
