"""Tensors by name in a file: safetensors, and torch's own format. Nothing in a file is ever executed.

Safetensors written here carry a checksum of all their bytes, its own eight digits counted as zeros; torch's format has one
for each record. Reading compares them as it goes through the file: no more memory than a piece of it.
"""

import errno
import json
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tarflow.models.errors import ModelError
from tarflow.records import DamagedFileError

CHECKSUM_KEY = "tarflow_checksum"
WAY_OUT = "copy it again from where it came, or export it anew"
MOST_TENSORS, LONGEST_NAME = 1 << 17, 1000
_BLANK = b"00000000"
_MARK = f'"{CHECKSUM_KEY}":"'.encode()  # as a value it would stand there with its quotes escaped
_PIECE = 1 << 22  # bytes


@dataclass(frozen=True)
class TensorFile:
    """Tensors on the CPU; `metadata`: what stands beside them. `checked`: every byte that counts fits a checksum."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    checked: bool


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata with their checksum; the same bytes for the same content."""
    save_file(dict(tensors), path, metadata={**metadata, CHECKSUM_KEY: _BLANK.decode()})
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(
            sorted(header["__metadata__"].items())
        )  # the library's order is another each time
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        assert len(text) == size, "a header in another order is as long"
        file.seek(8)
        file.write(text)
        at = 8 + text.index(_MARK) + len(_MARK)
        digits = _checksum(file, at)
        file.seek(at)
        file.write(digits)


def read_safetensors(path: Path, header_only: bool = False) -> TensorFile:
    """Read a file of safetensors, or all but its tensors; the checksum is compared in any case.

    Raises:
        DamagedFileError: it is no such file, or its checksum does not fit.
        ModelError: there is no file.

    """
    _require(path)
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if not 0 < header <= path.stat().st_size - 8:  # before the whole file is mapped, which may be a huge hole
        raise DamagedFileError(path, "it is not a readable safetensors file (it has no header)", WAY_OUT)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = _plain_names(path, file.keys())
            checked = CHECKSUM_KEY in metadata
            if checked:
                _compare(path, metadata[CHECKSUM_KEY])
            tensors = {} if header_only else {name: file.get_tensor(name) for name in names}
    except DamagedFileError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(path, f"it is not a readable safetensors file ({_flaw(error)})", WAY_OUT) from None
    return TensorFile(tensors, metadata, checked)


def _compare(path: Path, stated: str) -> None:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")  # bounded by the library, which has read it
        header = file.read(size)
        at = 8 + header.find(_MARK) + len(_MARK)
        if header.count(_MARK) != 1 or _checksum(file, at) != stated.encode():
            raise DamagedFileError(path, "its checksum does not fit its content", WAY_OUT)


def _checksum(file: BinaryIO, at: int) -> bytes:
    """CRC-32 of a file, hex, with the eight bytes at `at` taken as zeros."""
    file.seek(0)
    crc = zlib.crc32(_BLANK, zlib.crc32(file.read(at)))
    file.seek(at + len(_BLANK))
    while piece := file.read(_PIECE):
        crc = zlib.crc32(piece, crc)
    return f"{crc:08x}".encode()


def read_pickled(path: Path, attribute: str = "") -> TensorFile:
    """Read a dictionary of tensors in torch's format; what its `attribute` holds is the metadata.

    Raises:
        ModelError: there is no file, or it is a pickle of more than tensors, which is refused unopened.
        DamagedFileError: it is no such file, a record's checksum does not fit, or its tensors are larger than the file.

    """
    _require(path)
    with open(path, "rb") as file:
        records = file.read(4) == b"PK\3\4"  # by which torch tells its own newer format as well
    if records:
        _check_records(path)
    try:
        # Mapped, no storage reaches beyond the file, whatever size is claimed for it.
        with warnings.catch_warnings(action="ignore"):  # of pickles by others, which are refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=records)
    except pickle.UnpicklingError:  # its own text advises to load it all the same
        raise ModelError(
            f"{path} is refused: it is not a plain file of tensors but a pickle, and loading it could run code. Save its "
            "tensors alone with the program that made it: torch.save(model.state_dict(), 'FILE.pth')"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # bytes that are no pickle lead its machine astray in any way: KeyError, IndexError, ...
        flaw = _flaw(error)
        said = flaw.splitlines() if isinstance(error, RuntimeError | EOFError | OSError) else []
        text = said[0] if said else "no such format"
        raise DamagedFileError(path, f"it is not a readable weights file ({text})", WAY_OUT) from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in dict.values(content)):
        raise ModelError(f"{path} is not a dictionary of tensors, as published TarFlow weights are")
    # A dictionary out of a file may have attributes in place of its methods.
    tensors = {name: _dense(path, name, tensor) for name, tensor in dict.items(content)}
    _plain_names(path, tensors)
    return TensorFile(tensors, _texts(path, getattr(content, "__dict__", {}).get(attribute)), records)


def _check_records(path: Path) -> None:
    """The checksums of torch's records, which torch itself passes over."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise DamagedFileError(path, "its records are compressed, which torch never does", WAY_OUT)
            damaged = archive.testzip()
    except DamagedFileError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError) as error:
        raise DamagedFileError(path, f"its records cannot be read ({_flaw(error)})", WAY_OUT) from None
    if damaged is not None:
        raise DamagedFileError(path, f"the checksum of its record {damaged!r} does not fit", WAY_OUT)


def _dense(path: Path, name: Any, tensor: Tensor) -> Tensor:
    """A tensor of plain numbers that stand in the file, each of them. Others can claim any shape at no cost."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.is_nested or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise DamagedFileError(path, f"its tensor {str(name)[:80]!r} is not stored number by number", WAY_OUT)
    return tensor.detach()


def _plain_names(path: Path, names: Iterable[Any]) -> list[str]:
    found = list(names)
    if len(found) > MOST_TENSORS:
        raise DamagedFileError(path, f"it holds {len(found):,} tensors, more than {MOST_TENSORS:,}", WAY_OUT)
    for name in found:
        if not isinstance(name, str) or not name.isprintable() or len(name) > LONGEST_NAME:
            raise DamagedFileError(path, f"{str(name)[:80]!r} is no name of a tensor", WAY_OUT)
    return found


def _texts(path: Path, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in dict.items(value) for text in pair):
        raise DamagedFileError(path, "what stands beside its tensors is no text", WAY_OUT)
    return dict(dict.items(value))


def _flaw(error: Exception) -> str:
    """What is wrong with a file that cannot be parsed; an error of the system is raised again."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error) or type(error).__name__
    if error.errno != errno.EINVAL:
        raise error
    return "its directory points outside the file"  # a seek to a place that damage made up


def _require(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"no weights file at {path}")
