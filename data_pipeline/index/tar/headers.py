"""Single headers of a tar: checksums, sizes, extended records, maps of sparse members, and what links stand for."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

BLOCK = 512
_LOW = np.uint64(0x00FF00FF00FF00FF)


def checksums_right(table: np.ndarray) -> np.ndarray:
    """Bool [n]: whether the headers (uint8 [n, 512]) hold their checksum in the usual six octal digits.

    The sum runs over all bytes with the eight of the checksum itself counted as spaces. Bytes are added in pairs, four
    16-bit lanes to a word: 128 bytes of at most 255 a lane cannot overflow it.
    """
    words = table.view("<u8")
    pairs = words & _LOW
    words = words >> np.uint64(8)
    words &= _LOW
    pairs += words
    lanes = pairs.sum(axis=1, dtype=np.uint64)
    sums = sum((lanes >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
    field = table[:, 148:156].astype(np.int64)
    digits = field[:, :6] - 48
    stored = digits @ (8 ** np.arange(5, -1, -1))
    right: np.ndarray = (stored == sums.astype(np.int64) - field.sum(axis=1) + 8 * 32) & ((digits & ~7) == 0).all(
        axis=1
    )
    return right


def odd_size(field: bytes) -> int:
    """A size field that is no eleven octal digits: padded with NULs or spaces, or base-256. -1 when it is neither."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << 95) - 1)
        return value if value < 1 << 62 else -1
    try:
        return max(-1, int(field.strip(b"\0 ") or b"0", 8))
    except ValueError:
        return -1


def checksum_right(header: bytes) -> bool:
    """The slow and tolerant check: odd padding of the field, and old writers that summed signed bytes."""
    try:
        stored = int(header[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    rest = header[:148] + b" " * 8 + header[156:]
    return stored in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest))


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


def pax_size(records: dict[bytes, bytes]) -> int | None:
    """The size that records tell, at most 2^62; None where they tell none."""
    digits = records.get(b"size", b"")
    if not digits.isdigit():
        return None
    return min(int(digits), 1 << 62) if len(digits) < 25 else 1 << 62


def sparse_blocks(fd: int, position: int, more: int) -> int:
    """Blocks between the header of a sparse member and its bytes: the rest of its map, while `more` is not 0."""
    count = 0
    while more:
        count += 1
        block = os.pread(fd, BLOCK, position + count * BLOCK)
        more = block[504] if len(block) == BLOCK else 0
    return count


@dataclass(frozen=True)
class TarLink:
    """A member that is a link. A hard link's `target` counts from the root of the tar, a symbolic one's from its folder."""

    name: bytes
    target: bytes
    symbolic: bool

    def place(self) -> bytes:
        """The name of the member that is meant."""
        folder = posixpath.dirname(self.name) if self.symbolic else b""
        return posixpath.normpath(posixpath.join(folder, self.target))


def followed(links: list[TarLink], names: list[bytes]) -> tuple[list[tuple[bytes, int]], list[TarLink]]:
    """([(name of a link, position in `names` of what it stands for)], links to nothing in this tar).

    Links may lead to links, in any order and as often as a tar has members: each is looked at once. In the result, those
    that lead forwards to another link come after it.
    """
    if not links:
        return [], []
    places = {posixpath.normpath(name): i for i, name in enumerate(names)}
    targets = [link.place() for link in links]
    waiting: dict[bytes, list[int]] = {}  # a place -> links to it, while nothing is known to be there
    found: list[tuple[bytes, int]] = []
    reached: set[int] = set()
    for number, target in enumerate(targets):
        if target not in places:
            waiting.setdefault(target, []).append(number)
    ready = [(1, number) for number, target in enumerate(targets) if target in places]
    while ready:  # in the order of rounds through all links, until one brings nothing new
        turn, number = heappop(ready)
        at = places[targets[number]]
        found.append((links[number].name, at))
        reached.add(number)
        place = posixpath.normpath(links[number].name)
        if place not in places:
            places[place] = at
            for later in waiting.pop(place, ()):
                heappush(ready, (turn + (later < number), later))
    left = [link for number, link in enumerate(links) if number not in reached]
    return found, left
