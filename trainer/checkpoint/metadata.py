"""Reads a checkpoint's `.metadata`: which tensors there are, and which bytes of which file hold each piece of them.

The file is a pickle, as torch's distributed checkpoint writes it; `unpickle.py` opens it without running anything. What it
describes is checked here, piece by piece. Needs no torch.
"""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from tarflow.files import read_up_to
from tarflow.records import DamagedFileError
from tarflow.trainer.checkpoint.unpickle import DTYPES, FlawError, Made, pairs, unpickled

NAME = ".metadata"
MOST = 1 << 60  # of any number in it
LIMIT = 1 << 30  # bytes: the pieces of a thousand ranks of some thousand tensors take a quarter of it
WAY_OUT = "choose another checkpoint with --images (`tarflow checkpoint verify` looks at all of them)"

Ints = tuple[int, ...]


class Piece(NamedTuple):  # a hundred ranks write half a million of them
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
        data = read_up_to(path, LIMIT)
        if len(data) > LIMIT:
            raise FlawError(f"it has more than {LIMIT} bytes")
        with _uncollected():
            return _tensors(unpickled(data), sizes)
    except FlawError as flaw:
        raise DamagedFileError(path, str(flaw), WAY_OUT, what="torch's list of tensors") from None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector, which would walk the millions of objects that are being made, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --- what it describes ---


def _tensors(found: Any, sizes: dict[str, int]) -> dict[str, StoredTensor]:
    whole = _fields(found, "Metadata")
    # First where each piece lies, by the tensor's name and the piece's offset in it ...
    places: dict[tuple[str, Ints], tuple[str, int, int]] = {}
    for index, info in pairs(whole.get("storage_data"), "storage_data"):
        key, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        if place.get("transform_descriptors"):
            raise FlawError("storage_data: its bytes are transformed")
        name, offset = _text(key.get("fqn")), _size(key.get("offset"), "storage_data")
        file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if not isinstance(file, str) or file not in sizes:
            named = repr(file[:80]) if isinstance(file, str) else "something without a name"  # whose repr may never end
            raise FlawError(f"{name}: it lies in {named}, which is not a file of the checkpoint")
        if not (_is_count(start) and _is_count(length) and start + length <= sizes[file]):
            raise FlawError(f"{name}: its place is not within the {sizes[file]} bytes of {file}")
        if (name, offset) in places:
            raise FlawError(f"{name}: a piece is listed twice")
        places[name, offset] = (file, start, length)
    # ... then the tensors, whose pieces look up their places.
    tensors = {}
    for key, value in pairs(whole.get("state_dict_metadata"), "state_dict_metadata"):
        name = _text(key)
        if name in tensors:
            raise FlawError(f"{name} is listed twice")
        tensors[name] = _tensor(name, _fields(value, "TensorStorageMetadata", name), places)
    return tensors


def _tensor(name: str, value: dict[str, Any], places: dict[tuple[str, Ints], tuple[str, int, int]]) -> StoredTensor:
    shape, chunks, properties = _size(value.get("size"), name), value.get("chunks"), value.get("properties")
    state = (
        properties.state if isinstance(properties, Made) and type(properties).__name__ == "TensorProperties" else None
    )
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FlawError(f"{name}: it has no known dtype")
    if not isinstance(chunks, list):
        raise FlawError(f"{name}: it has no pieces")
    # Pieces lie inside the shape, start at different offsets, and together hold as many numbers as it does.
    pieces, filled = [], 0
    begins, not_empty = set(), 0  # of a short tensor, some ranks hold nothing
    for chunk in chunks:
        box = _fields(chunk, "ChunkStorageMetadata", name)
        offsets, extents = _size(box.get("offsets"), name), _size(box.get("sizes"), name)
        if not len(offsets) == len(extents) == len(shape):
            raise FlawError(f"{name}: one of its pieces has another number of dimensions")
        for offset, extent, numbers in zip(offsets, extents, shape):
            if offset + extent > numbers:
                raise FlawError(f"{name}: one of its pieces lies outside its shape")
        place = places.get((name, offsets))
        if place is None:
            raise FlawError(f"{name}: no place is given for one of its pieces")
        pieces.append(Piece(offsets, extents, *place))
        held = math.prod(extents)
        if held:
            filled, not_empty = filled + held, not_empty + 1
            begins.add(offsets)
    if filled != math.prod(shape) or len(begins) < not_empty:
        raise FlawError(f"{name}: its pieces do not fill its shape")
    return StoredTensor(shape, dtype, pieces)


def _fields(value: Any, kind: str, where: str = "") -> dict[str, Any]:
    """The state of an object, by field name."""
    if not isinstance(value, Made) or type(value).__name__ != kind or type(value.state) is not list:
        raise FlawError(f"{where + ': ' if where else ''}there is something else where {kind} is expected")
    names, values = value.state[::2], value.state[1::2]
    for name in names:
        if type(name) is not str:  # and so may be hashed
            raise FlawError(f"{kind} has a field without a name")
    return dict(zip(names, values))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 1000:
        raise FlawError(
            f"{value if isinstance(value, str) else type(value).__name__!r:.60} is not the name of a tensor"
        )
    return value


def _size(value: Any, where: str) -> Ints:
    """The numbers of a torch.Size, none of them negative."""
    made: tuple[Any, ...] = value.arguments if isinstance(value, Made) and type(value).__name__ == "Size" else ()
    if len(made) == 1 and type(made[0]) is tuple and len(made[0]) <= 16:
        for number in made[0]:
            if type(number) is not int or not 0 <= number < MOST:
                break
        else:
            return made[0]
    raise FlawError(f"{where}: a shape or an offset is not one")


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < MOST
