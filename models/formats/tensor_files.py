"""Named tensors in a file: safetensors, and torch's own format. Nothing in a file is ever executed.

Safetensors written here carry a CRC-32 of all their bytes, with its own eight digits counted as zeros; torch's format has
one per record. Checksums are verified a chunk at a time, so memory use does not grow with the file.
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

from tarflow.files import open_to_read
from tarflow.models.errors import ModelError
from tarflow.records import DamagedFileError

CHECKSUM_KEY = "tarflow_checksum"
WAY_OUT = "copy it again from its source, or export it again"
MOST_TENSORS, LONGEST_NAME = 1 << 17, 1000
_BLANK = b"00000000"
_MARK = f'"{CHECKSUM_KEY}":"'.encode()  # inside a value its quotes would be escaped
_PIECE = 1 << 22  # bytes


@dataclass(frozen=True)
class TensorFile:
    """Tensors on the CPU, and the file's metadata. `checked`: every byte that matters was verified by a checksum."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    checked: bool


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata with a checksum; equal content gives equal bytes."""
    save_file(dict(tensors), path, metadata={**metadata, CHECKSUM_KEY: _BLANK.decode()})
    with open(path, "r+b") as file:
        # The library writes metadata in arbitrary order; sorted in place, the header keeps its length.
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        assert len(text) == size, "reordering keeps the length"
        file.seek(8)
        file.write(text)
        at = 8 + text.index(_MARK) + len(_MARK)
        digits = _checksum(file, at)
        file.seek(at)
        file.write(digits)


def read_safetensors(path: Path, header_only: bool = False) -> TensorFile:
    """Read a safetensors file, or all but its tensors; the checksum is verified in either case.

    Raises:
        DamagedFileError: it is not a safetensors file, or its checksum does not match.
        ModelError: there is no file.

    """
    _require(path)
    with open_to_read(path) as file:
        header = int.from_bytes(file.read(8), "little")
    if not 0 < header <= path.stat().st_size - 8:  # before the library maps the file, which may be sparse and huge
        raise DamagedFileError(path, "it is not a readable safetensors file (it has no header)", WAY_OUT)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = _plain_names(path, file.keys())
            checked = CHECKSUM_KEY in metadata
            if checked:
                _verify_checksum(path, metadata[CHECKSUM_KEY])
            tensors = {} if header_only else {name: file.get_tensor(name) for name in names}
    except DamagedFileError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(path, f"it is not a readable safetensors file ({_flaw(error)})", WAY_OUT) from None
    return TensorFile(tensors, metadata, checked)


def _verify_checksum(path: Path, stated: str) -> None:
    with open_to_read(path) as file:
        size = int.from_bytes(file.read(8), "little")  # the library has opened the file, so this is in bounds
        header = file.read(size)
        at = 8 + header.find(_MARK) + len(_MARK)
        if header.count(_MARK) != 1 or _checksum(file, at) != stated.encode():
            raise DamagedFileError(path, "its checksum does not match its content", WAY_OUT)


def _checksum(file: BinaryIO, at: int) -> bytes:
    """CRC-32 of a file in hex, with the eight bytes at `at` counted as zeros."""
    file.seek(0)
    crc = zlib.crc32(_BLANK, zlib.crc32(file.read(at)))
    file.seek(at + len(_BLANK))
    while piece := file.read(_PIECE):
        crc = zlib.crc32(piece, crc)
    return f"{crc:08x}".encode()


def read_pickled(path: Path, attribute: str = "") -> TensorFile:
    """Read a dictionary of tensors in torch's format; its attribute of the given name holds the metadata.

    Raises:
        ModelError: there is no file, or it pickles more than tensors and is refused without being executed.
        DamagedFileError: it is not in that format, a record's checksum does not match, or a tensor claims more than is stored.

    """
    _require(path)
    with open_to_read(path) as file:
        records = file.read(4) == b"PK\3\4"  # a zip, torch's format since 1.6; before, a bare pickle
    if records:
        _check_records(path)
    try:
        # Mapped, no storage can reach beyond the file, whatever size it claims. The warnings are about pickles from other
        # programs, which are refused below.
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=records)
    except pickle.UnpicklingError:  # torch's message would advise loading it with weights_only=False
        raise ModelError(
            f"{path} is refused: it is not a plain file of tensors but a pickle, and loading it could run code. Save its "
            "tensors alone with the program that made it: torch.save(model.state_dict(), 'FILE.pth')"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (the unpickler fails in any way on arbitrary bytes: KeyError, IndexError, ...)
        flaw = _flaw(error)
        lines = flaw.splitlines() if isinstance(error, RuntimeError | EOFError | OSError) else []
        text = lines[0] if lines else "unknown format"
        raise DamagedFileError(path, f"it is not a readable weights file ({text})", WAY_OUT) from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in dict.values(content)):
        raise ModelError(f"{path} is not a dictionary of tensors, as published TarFlow weights are")
    # An object from a pickle may shadow its methods with attributes: go by those of the class.
    tensors = {name: _dense(path, name, tensor) for name, tensor in dict.items(content)}
    _plain_names(path, tensors)
    return TensorFile(tensors, _texts(path, getattr(content, "__dict__", {}).get(attribute)), records)


def _check_records(path: Path) -> None:
    """Verify the checksums of the records in torch's zip format, which torch itself ignores."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise DamagedFileError(path, "its records are compressed, and torch never compresses them", WAY_OUT)
            damaged = archive.testzip()
    except DamagedFileError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError) as error:
        raise DamagedFileError(path, f"its records cannot be read ({_flaw(error)})", WAY_OUT) from None
    if damaged is not None:
        raise DamagedFileError(path, f"the checksum of its record {damaged!r} does not match", WAY_OUT)


def _dense(path: Path, name: Any, tensor: Tensor) -> Tensor:
    """The tensor, if it is dense and the file stores each of its numbers. Any other kind can claim any shape at no cost."""
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
            raise DamagedFileError(path, f"{str(name)[:80]!r} is not a valid tensor name", WAY_OUT)
    return found


def _texts(path: Path, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in dict.items(value) for text in pair):
        raise DamagedFileError(path, "its metadata are not text", WAY_OUT)
    return dict(dict.items(value))


def _flaw(error: Exception) -> str:
    """What is wrong with a file that cannot be parsed, as text; re-raises errors of the system."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error) or type(error).__name__
    if error.errno != errno.EINVAL:
        raise error
    return "its directory points outside the file"  # a seek to an offset that damage made up


def _require(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"no weights file at {path}")
