"""Opens the pickle of a checkpoint's `.metadata` without trusting it: plain objects of this file, or an error.

A pickle can run any code when it is opened, and can be made to take for ever or all memory. Python's own C unpickler is fast
enough for the half million pieces that a hundred ranks write; what it would trust is taken away first, in one pass over the
operations:

- only the operations that torch's metadata consist of are let through, with every length checked against what is there;
- a dictionary becomes the list of its keys and values, because a dictionary hashes its keys, and the hash of tuples that
  hold each other takes for ever;
- the names that it may refer to stand for plain classes of this file, never for torch's own.

Needs no torch.
"""

import io
import pickle
import re
from typing import Any

DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    (_METADATA, "Metadata"), (_METADATA, "MetadataIndex"), (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"), (_METADATA, "TensorProperties"), (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
    ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
}  # fmt: skip


class FlawError(ValueError):
    """What is wrong with the metadata."""


class Made:
    """Stands for an object of a class: the arguments that it was made from, and its state."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def unpickled(data: bytes) -> Any:
    """The object in a pickle: `Made` objects, lists, tuples, texts and numbers; see `pairs` for its dictionaries.

    Raises FlawError for anything that torch's metadata of tensors do not contain.
    """
    try:
        return _Unpickler(_without_dictionaries(data)).load()
    except FlawError:
        raise
    except Exception as error:  # noqa: BLE001 - arbitrary bytes raise anything: KeyError, IndexError, ...
        raise FlawError(f"it is not a pickle of metadata ({type(error).__name__})") from None


def pairs(value: Any, where: str) -> list[tuple[Any, Any]]:
    """The keys and values of what was a dictionary. Nothing of them is hashed here. Raises FlawError."""
    if type(value) is not list:
        raise FlawError(f"{where} is not a table")
    items = iter(value)
    # A key is never a tuple: that is an entry which was added alone.
    return [item if type(item) is tuple and len(item) == 2 else (item, next(items, None)) for item in items]


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        # Classes of this instance only: a pickle may set attributes even of a class.
        self._classes = {name: type(name[1], (Made,), {}) for name in _CLASSES}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) not in self._classes:
            raise FlawError(f"it names {module!r:.60}, {name!r:.60}, which is not part of the metadata of tensors")
        return self._classes[module, name]


# --- the operations ---


def _one_of(names: str) -> bytes:
    return b"[" + b"".join(re.escape(getattr(pickle, name)) for name in names.split()) + b"]"


# Operations without an argument, and with one of 1, 2 or 4 bytes; none of them needs a look.
_PLAIN = b"|".join(
    [
        _one_of(
            "MARK MEMOIZE NONE NEWTRUE NEWFALSE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS "
            "STACK_GLOBAL REDUCE NEWOBJ BUILD"
        ),
        _one_of("PROTO BINPUT BINGET BININT1") + b".",
        _one_of("BININT2") + b"..",
        _one_of("LONG_BINGET BININT") + b"....",
    ]
)
# What does: the groups are numbered in `_without_dictionaries`.
_LOOKED_AT = rb"(\})|(u)|(s)|\x8c(.)|(\.)|X(....)|\x8a(.)|(c[^\n]*\n[^\n]*\n)|\x95(.{8})|r(....)"
_NEXT = re.compile(rb"(?:%b)*+(?:%b)" % (_PLAIN, _LOOKED_AT), re.DOTALL)
_DICT, _ITEMS, _ITEM, _SHORT_TEXT, _STOP, _TEXT, _LONG, _GLOBAL, _FRAME, _MEMO = range(1, 11)


def _without_dictionaries(data: bytes) -> bytes:
    """The same pickle with lists in the place of dictionaries. Raises FlawError for operations that are not torch's."""
    # EMPTY_DICT becomes EMPTY_LIST and SETITEMS becomes APPENDS, byte for byte; SETITEM, which takes two values, becomes
    # TUPLE2 and APPEND.
    parts: list[bytes | bytearray] = []
    changed, taken, at = bytearray(data), 0, 0
    while True:
        found = _NEXT.match(data, at)
        if found is None:
            raise FlawError("it is not a pickle of metadata (an operation that is not torch's)")
        at, kind = found.end(), found.lastindex
        if kind == _DICT:
            changed[at - 1] = pickle.EMPTY_LIST[0]
        elif kind == _ITEMS:
            changed[at - 1] = pickle.APPENDS[0]
        elif kind == _ITEM:
            parts += [changed[taken : at - 1], pickle.TUPLE2 + pickle.APPEND]
            taken = at
        elif kind in (_SHORT_TEXT, _TEXT, _LONG):
            at += int.from_bytes(found[kind], "little")
        elif kind == _STOP:
            return b"".join([*parts, changed[taken:at]])
        elif kind == _MEMO and int.from_bytes(found[kind], "little") > at:
            raise FlawError(
                "it is not a pickle of metadata (more places than objects)"
            )  # the table grows by the number
