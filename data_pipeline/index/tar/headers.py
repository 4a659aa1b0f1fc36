"""The blocks of a tar: the fields of a header, its checksum, and what extended headers say of the member behind them.

A tar is a sequence of blocks of 512 bytes. A member is a header and its content, padded to whole blocks; a block of NULs ends
the archive. What a header's fields cannot hold (long names, sizes from 8 GiB, fractions of a second) stands in an extended
header before it: GNU's `L` and `K`, or the records of POSIX pax. The layout is that of `ustar` (POSIX.1-1988); GNU uses other
bytes only behind the magic.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

Headers = NDArray[np.uint8]  # [n, BLOCK]

BLOCK = 512
END_MARK = bytes(BLOCK)

# Fields of a header, as slices of its bytes.
NAME = slice(0, 100)
SIZE = slice(124, 136)
SIZE_DIGITS = slice(124, 135)  # octal, and then a NUL or a space
CHECKSUM = slice(148, 156)
TYPE = 156
LINK_TARGET = slice(157, 257)
BEHIND_MAGIC = 262  # NUL in ustar, a space in GNU's headers, which have no prefix
PREFIX = slice(345, 500)  # the folders of a name that is too long for NAME
SPARSE_GOES_ON = 482  # in GNU's sparse headers: whether the map of the pieces goes on in a block of its own
MAP_GOES_ON = 504  # the same, in such a block

# Types of members, as the byte at TYPE.
FILE = ord("0")
REGULAR = b"0\x007"  # files, also as V7 and systems with contiguous files write them
HARD_LINK, SYMBOLIC_LINK = b"12"
NO_CONTENT = b"123456"  # links, devices, folders, pipes: whatever their size field holds, no content follows
SPARSE = ord("S")
LONG_NAME, LONG_LINK, PAX = b"LKx"
PAX_GLOBAL = ord("g")
EXTENDED = bytes((LONG_NAME, LONG_LINK, PAX))

MAX_EXTENDED = 1 << 20  # bytes of an extended header that are read
_MAX_SIZE = 1 << 62

_LOW_BYTES = np.uint64(0x00FF00FF00FF00FF)
_OCTAL = 8 ** np.arange(5, -1, -1)


def padded(size: int) -> int:
    """Bytes that a content of `size` bytes takes: whole blocks."""
    return (size + BLOCK - 1) & -BLOCK


def text_of(field: bytes) -> bytes:
    """A field up to its first NUL: what follows may be left over from an earlier use of the writer's buffer."""
    return field.split(b"\0", 1)[0]


def name_of(header: bytes) -> bytes:
    """The name in a header, with its prefix."""
    name = text_of(header[NAME])
    if header[BEHIND_MAGIC] == 0 and header[PREFIX.start]:
        return text_of(header[PREFIX]) + b"/" + name
    return name


def size_of(header: bytes) -> int:
    """The size in a header; -1 if it is not a number."""
    try:
        size = int(header[SIZE_DIGITS], 8)
    except ValueError:
        return _odd_size(header[SIZE])
    return size if size >= 0 else -1


def _odd_size(field: bytes) -> int:
    """A size that is not eleven octal digits: padded with NULs or spaces, or base-256 (GNU). -1 if it is neither."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << 95) - 1)
        return value if value < _MAX_SIZE else -1
    try:
        return max(-1, int(field.strip(b"\0 ") or b"0", 8))
    except ValueError:
        return -1


def checksum_ok(header: bytes) -> bool:
    """Whether the header holds its checksum, the sum of its bytes with those of the checksum itself as spaces.

    Tolerates odd padding of the field, and old writers that summed signed bytes.
    """
    try:
        stored = int(header[CHECKSUM].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    rest = header[: CHECKSUM.start] + b" " * 8 + header[CHECKSUM.stop :]
    return stored in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest))


def checksums_ok(headers: Headers) -> NDArray[np.bool_]:
    """Bool [n]: whether each header holds its checksum in the usual six octal digits; `checksum_ok` decides on the others.

    Bytes are added in pairs, four 16-bit lanes to a word: 128 bytes of at most 255 each cannot overflow a lane.
    """
    words = headers.view("<u8")
    pairs = words & _LOW_BYTES
    words = words >> np.uint64(8)
    words &= _LOW_BYTES
    pairs += words
    lanes = pairs.sum(axis=1, dtype=np.uint64)
    sums = sum((lanes >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
    field = headers[:, CHECKSUM].astype(np.int64)
    digits = field[:, :6] - ord("0")
    stored = digits @ _OCTAL
    right: NDArray[np.bool_] = stored == sums.astype(np.int64) - field.sum(axis=1) + 8 * ord(" ")
    return right & ((digits & ~7) == 0).all(axis=1)


class Extension:
    """What extended headers say of the next member, instead of its own header; None where they say nothing."""

    # Not a dataclass: one is made for every member with a long name, and this takes a fifth of the time.

    name: bytes | None = None
    link_target: bytes | None = None
    size: int | None = None
    sparse: bool = False


def extend(so_far: Extension | None, kind: int, data: bytes) -> Extension | None:
    """`so_far` and what an extended header of the type `kind` with the content `data` adds to it."""
    if kind == PAX and b"path=" not in data and b"size=" not in data:
        return so_far  # nearly all of them: a time stamp with fractions
    out = so_far or Extension()
    if kind == LONG_NAME:
        out.name = text_of(data)
    elif kind == LONG_LINK:
        out.link_target = text_of(data)
    else:
        records = pax_records(data)
        out.name = records.get(b"GNU.sparse.name", records.get(b"path", out.name))
        out.link_target = records.get(b"linkpath", out.link_target)
        size = _pax_size(records)
        out.size = out.size if size is None else size
        out.sparse = b"GNU.sparse." in data
    return out


def pax_records(data: bytes) -> dict[bytes, bytes]:
    """Records `length key=value newline`; a malformed rest is ignored, as other readers do."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        length, space, _ = data[position : position + 24].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            break
        name, _, value = data[position + len(length) + 1 : position + int(length) - 1].partition(b"=")
        records[name] = value
        position += int(length)
    return records


def _pax_size(records: dict[bytes, bytes]) -> int | None:
    """The size in pax records, at most _MAX_SIZE; None without one."""
    digits = records.get(b"size", b"")
    if not digits.isdigit():
        return None
    return min(int(digits), _MAX_SIZE) if len(digits) < 25 else _MAX_SIZE  # int() of a million digits takes minutes


def sparse_map_bytes(fd: int, position: int, header: bytes) -> int:
    """Bytes between the header of a GNU sparse member at `position` and its content: the rest of the map of its pieces."""
    blocks, goes_on = 0, header[SPARSE_GOES_ON]
    while goes_on:
        blocks += 1
        block = os.pread(fd, BLOCK, position + blocks * BLOCK)
        goes_on = block[MAP_GOES_ON] if len(block) == BLOCK else 0
    return blocks * BLOCK
