"""Reads a checkpoint's `.metadata`: which tensors there are, and which bytes of which file hold each piece of them.

The file is a pickle, as torch's distributed checkpoint writes it, and a pickle can run any code when it is opened. So this
unpickler knows only the operations and the names that torch's metadata consist of, and even those names stand for plain
classes of this file, never for torch's own. The result is then checked piece by piece. Needs no torch.
"""

import io
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

from tarflow.files import open_to_read
from tarflow.records import DamagedFileError

NAME = ".metadata"
LIMIT = 1 << 30  # bytes: the pieces of a thousand ranks of some thousand tensors take a quarter of it
WAY_OUT = "choose another checkpoint with --images (`tarflow checkpoint verify` looks at all of them)"
DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and where its bytes are."""

    offsets: Ints
    sizes: Ints
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: `dtype` as torch calls it, and pieces that fill its shape."""

    shape: Ints
    dtype: str
    pieces: list[Piece]


def read_metadata(folder: Path, sizes: dict[str, int]) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint in a folder, by name. `sizes`: bytes of each file that it may refer to.

    Raises DamagedFileError if the pickle holds anything but torch's metadata of tensors, refers to other files or beyond
    the end of one, or if the pieces of a tensor do not fill it.
    """
    path = folder / NAME
    try:
        with open_to_read(path) as file:
            data = file.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise _FlawError(f"it has more than {LIMIT} bytes")
        return _tensors(_unpickled(data), sizes)
    except _FlawError as flaw:
        raise DamagedFileError(path, str(flaw), WAY_OUT, what="torch's list of tensors") from None


class _FlawError(ValueError):
    pass


# --- the pickle ---


class _Pairs(list[tuple[Any, Any]]):
    """Stands for a dictionary. Nothing from a pickle is hashed: deeply nested tuples would take for ever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.append((key, value))


class _Made:
    """Stands for an object of a class: the arguments that it was made from, and its state."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    (_METADATA, "Metadata"), (_METADATA, "MetadataIndex"), (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"), (_METADATA, "TensorProperties"), (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
    ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip
_OPERATIONS = (
    "PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 "
    "SHORT_BINUNICODE BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM "
    "SETITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD"
)
_Base: Any = pickle._Unpickler  # the Python version: its operations can be chosen, and it does not trust sizes


class _Unpickler(_Base):
    dispatch: ClassVar = {
        code: _Base.dispatch[code] for code in (ord(getattr(pickle, name)) for name in _OPERATIONS.split())
    }

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        # Classes of this instance only: a pickle may set attributes even of a class.
        self._classes = {name: type(name[1], (_Made,), {}) for name in _CLASSES}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) not in self._classes:
            raise _FlawError(f"it names {module!r:.60}, {name!r:.60}, which is not part of the metadata of tensors")
        return self._classes[module, name]

    def load_empty_dictionary(self) -> None:
        self.append(_Pairs())

    dispatch[ord(pickle.EMPTY_DICT)] = load_empty_dictionary


def _unpickled(data: bytes) -> Any:
    try:
        return _Unpickler(data).load()
    except _FlawError:
        raise
    except Exception as error:  # noqa: BLE001 - arbitrary bytes raise anything: KeyError, IndexError, ...
        raise _FlawError(f"it is not a pickle of metadata ({type(error).__name__})") from None


# --- what it describes ---


def _tensors(found: Any, sizes: dict[str, int]) -> dict[str, StoredTensor]:
    whole = _fields(found, "Metadata")
    # First where each piece lies, by the tensor's name and the piece's offset in it ...
    places: dict[tuple[str, Ints], tuple[str, int, int]] = {}
    for index, info in _pairs(whole.get("storage_data"), "storage_data"):
        key, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        if place.get("transform_descriptors"):
            raise _FlawError("storage_data: its bytes are transformed")
        name, offset = _text(key.get("fqn")), _size(key.get("offset"), "storage_data")
        file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if not isinstance(file, str) or file not in sizes:
            raise _FlawError(f"{name}: it lies in {file!r:.80}, which is not a file of the checkpoint")
        if not (_is_count(start) and _is_count(length) and start + length <= sizes[file]):
            raise _FlawError(f"{name}: its place is not within the {sizes[file]} bytes of {file}")
        if (name, offset) in places:
            raise _FlawError(f"{name}: a piece is listed twice")
        places[name, offset] = (file, start, length)
    # ... then the tensors, whose pieces look up their places.
    tensors = {}
    for key, value in _pairs(whole.get("state_dict_metadata"), "state_dict_metadata"):
        name = _text(key)
        if name in tensors:
            raise _FlawError(f"{name} is listed twice")
        tensors[name] = _tensor(name, _fields(value, "TensorStorageMetadata", name), places)
    return tensors


def _tensor(name: str, value: dict[str, Any], places: dict[tuple[str, Ints], tuple[str, int, int]]) -> StoredTensor:
    shape, chunks, properties = _size(value.get("size"), name), value.get("chunks"), value.get("properties")
    state = (
        properties.state if isinstance(properties, _Made) and type(properties).__name__ == "TensorProperties" else None
    )
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _FlawError(f"{name}: it has no known dtype")
    if not isinstance(chunks, list):
        raise _FlawError(f"{name}: it has no pieces")
    # Pieces lie inside the shape, start at different offsets, and together hold as many numbers as it does.
    pieces, filled = [], 0
    for chunk in chunks:
        box = _fields(chunk, "ChunkStorageMetadata", name)
        offsets, extents = _size(box.get("offsets"), name), _size(box.get("sizes"), name)
        if not len(offsets) == len(extents) == len(shape):
            raise _FlawError(f"{name}: one of its pieces has another number of dimensions")
        if any(o + e > n for o, e, n in zip(offsets, extents, shape)):
            raise _FlawError(f"{name}: one of its pieces lies outside its shape")
        if (name, offsets) not in places:
            raise _FlawError(f"{name}: no place is given for one of its pieces")
        pieces.append(Piece(offsets, extents, *places[name, offsets]))
        filled += math.prod(extents)
    if filled != math.prod(shape) or len({p.offsets for p in pieces if math.prod(p.sizes)}) < _filled(pieces):
        raise _FlawError(f"{name}: its pieces do not fill its shape")
    return StoredTensor(shape, dtype, pieces)


def _filled(pieces: list[Piece]) -> int:
    """Number of pieces that are not empty; of a short tensor, some ranks hold nothing."""
    return sum(math.prod(p.sizes) > 0 for p in pieces)


def _fields(value: Any, kind: str, where: str = "") -> dict[str, Any]:
    """The state of an object, by field name."""
    if not isinstance(value, _Made) or type(value).__name__ != kind or not isinstance(value.state, _Pairs):
        raise _FlawError(f"{where + ': ' if where else ''}there is something else where {kind} is expected")
    if not all(isinstance(name, str) for name, _ in value.state):
        raise _FlawError(f"{kind} has a field without a name")
    return dict(value.state)


def _pairs(value: Any, where: str) -> _Pairs:
    if not isinstance(value, _Pairs):
        raise _FlawError(f"{where} is not a table")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 1000:
        raise _FlawError(
            f"{value if isinstance(value, str) else type(value).__name__!r:.60} is not the name of a tensor"
        )
    return value


def _size(value: Any, where: str) -> Ints:
    """The numbers of a torch.Size, none of them negative."""
    made: tuple[Any, ...] = value.arguments if isinstance(value, _Made) and type(value).__name__ == "Size" else ()
    if len(made) != 1 or not isinstance(made[0], tuple) or len(made[0]) > 16 or not all(map(_is_count, made[0])):
        raise _FlawError(f"{where}: a shape or an offset is not one")
    return made[0]


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 60
