"""One pass over the headers of a tar file: which members it holds and where their bytes lie.

Reads ustar, GNU (long names, base-256 sizes) and pax headers, follows links to members of the same tar, and reports
damage instead of raising, so that the caller can apply its policy. The walk from header to header only reads sizes; names
and checksums are then taken from all headers at once with NumPy, which makes a scan about as fast as reading the headers
alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.tar.headers import (
    BLOCK,
    TarLink,
    checksum_right,
    checksums_right,
    followed,
    odd_size,
    pax_records,
    pax_size,
    sparse_blocks,
)  # fmt: skip

_ZERO = bytes(BLOCK)
_WINDOW = 4096  # one read often serves an extended header, the header, a small text member and the next header
SMALL = 256  # contents up to this size are kept as they pass by: label members
_WINDOWS = 256  # windows whose headers are checked together; a megabyte stays in the processor's cache
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"LKxg"
_REGULAR = np.frombuffer(b"0\x007", dtype=np.uint8)
_GUESSES = 2  # times that guessing may come to an end in one shard before it is given up
_LINKS, _SYMBOLIC, _SPARSE = b"12", 50, 83
_NO_CONTENT = b"123456"  # links, devices, folders, pipes: whatever their size field says, no content follows


@dataclass
class TarScan:
    """What a scan found. `names`, `offsets` (of the content) and `sizes` in bytes run in parallel, regular files only.

    `contents` holds the bytes of small members by position in `names`. `damage` says what is wrong with the file, or
    is None; `cut_member` names the member that the damage hit, where one is known. A link to a member of this tar is a
    member with the same bytes, after all others; `links` holds the rest. `sparse`: members whose bytes lie in pieces.
    """

    path: Path
    file_bytes: int = 0
    names: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    contents: dict[int, bytes] = field(default_factory=dict)
    not_files: int = 0
    links: list[TarLink] = field(default_factory=list)
    sparse: list[bytes] = field(default_factory=list)
    damage: str | None = None
    cut_member: bytes | None = None

    def content(self, i: int) -> bytes:
        """The bytes of member i; read from the file unless it was small enough to be kept."""
        kept = self.contents.get(i)
        if kept is not None:
            return kept
        with self.path.open("rb") as file:
            file.seek(self.offsets[i])
            return file.read(self.sizes[i])


def scan_tar(path: Path, keep: int = SMALL) -> TarScan:
    """Scan the headers of the tar at `path`; contents of up to `keep` bytes are kept.

    Raises DataError when the file cannot be opened or is compressed (offsets into it would mean nothing).
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as err:
        raise DataError(f"cannot open shard {path}: {err.strerror}") from None
    try:
        scan = TarScan(path, os.fstat(fd).st_size)
        try:
            _walk(fd, scan, keep)
        except OSError as err:
            raise DataError(f"cannot read shard {path}: {err.strerror}") from None
        if not scan.names and scan.damage and scan.cut_member is None:
            head = os.pread(fd, 8, 0)
            for magic, how in _COMPRESSED.items():
                if head.startswith(magic):
                    raise DataError(f"shard {path} is {how}-compressed: reading by offset needs a plain tar, unpack it")
            scan.damage = f"not a tar file ({scan.damage})" if scan.file_bytes else "the file is empty (0 bytes)"
        _follow_links(scan)
        return scan
    finally:
        os.close(fd)


def _follow_links(scan: TarScan) -> None:
    found, scan.links = followed(scan.links, scan.names)
    for name, at in found:
        if at in scan.contents:
            scan.contents[len(scan.names)] = scan.contents[at]
        scan.names.append(name)
        scan.offsets.append(scan.offsets[at])
        scan.sizes.append(scan.sizes[at])
    scan.not_files -= len(found)


class _Batch:
    """Windows of the file with the headers met since the last check.

    Header i starts at `at[i]` in `buffer` and at `positions[i]` in the file. `sizes`: bytes of content. By number in
    the batch, what is special about some: `not_files` (extended headers and everything without content), `long_names`,
    `links` (their targets), `sparse`.
    """

    def __init__(self, buffer: bytearray) -> None:
        self.buffer = buffer
        self.at: list[int] = []
        self.positions: list[int] = []
        self.sizes: list[int] = []
        self.not_files: set[int] = set()
        self.long_names: dict[int, bytes] = {}
        self.links: dict[int, bytes] = {}
        self.sparse: set[int] = set()

    def header(self, i: int) -> bytes:
        """The 512 bytes of header i."""
        return bytes(self.buffer[self.at[i] : self.at[i] + BLOCK])


def _walk(fd: int, scan: TarScan, keep: int) -> None:
    """Go from header to header; hand batches of them to `_take`. The hot loop of indexing: plain files first.

    Headers stay where they were read: a Python object for each would cost more than reading it.
    """
    end = scan.file_bytes
    buffer = bytearray(_WINDOWS * _WINDOW)
    windows = [memoryview(buffer)[i : i + _WINDOW] for i in range(0, len(buffer), _WINDOW)]
    batch = _Batch(buffer)
    at, positions, sizes = batch.at, batch.positions, batch.sizes
    position = start = used = base = filled = 0  # the newest window: buffer[base:used] holds the file from `start` on
    long_name: bytes | None = None
    long_link: bytes | None = None
    long_size: int | None = None
    sparse = False
    guesses = _GUESSES
    while True:
        inside = base + position - start
        content = inside + BLOCK
        if content > used:
            if position >= end:
                used = base
                break
            if filled == _WINDOWS:
                if not _take(batch, scan, fd, keep):
                    return
                if long_name is None and long_size is None and guesses > 0:
                    layout = [place % _WINDOW for place in at if place // _WINDOW == _WINDOWS - 1]
                    while (further := _leap(fd, scan, keep, position, layout, buffer, windows)) > position:
                        position = further
                    guesses -= 1  # it came to an end: right for the last few of a shard, no use where layouts vary
                batch = _Batch(buffer)
                at, positions, sizes = batch.at, batch.positions, batch.sizes
                filled = 0
                if position >= end:
                    start, used, base = position, 0, 0
                    break
            base = inside = filled * _WINDOW
            start, content = position, inside + BLOCK
            used = base + os.preadv(fd, [windows[filled]], position)
            if used < base + _WINDOW and position + used - base < end:
                used = base + _fill(fd, windows[filled], position)
            filled += 1
            if used < content:
                break
        try:
            size = int(buffer[inside + 124 : inside + 135], 8)
            if size < 0:
                raise ValueError
        except ValueError:
            header = bytes(buffer[inside:content])
            if header == _ZERO:
                _take(batch, scan, fd, keep)
                return
            size = odd_size(header[124:136])
            if size < 0:
                if _take(batch, scan, fd, keep):
                    scan.damage = f"no valid member header at byte {position}"
                return
        kind = buffer[inside + 156]
        at.append(inside)
        positions.append(position)
        if kind == 48 or kind == 0 or kind == 55:  # '0', NUL and '7': regular files
            if long_name is not None:
                batch.long_names[len(sizes)] = long_name
                long_name = None
            if long_size is not None:
                size, long_size = long_size, None
            if sparse:
                batch.not_files.add(len(sizes))
                batch.sparse.add(len(sizes))
                sparse = False
        else:
            batch.not_files.add(len(sizes))
            if kind in (_PAX, _LONG_NAME, _LONG_LINK):
                data = bytes(buffer[content : min(content + size, used)])
                if len(data) < size:
                    data = os.pread(fd, min(size, 1 << 20), position + BLOCK)
                if kind == _LONG_NAME:
                    long_name = data.split(b"\0", 1)[0]
                elif kind == _LONG_LINK:
                    long_link = data.split(b"\0", 1)[0]
                elif b"path=" in data or b"size=" in data:
                    records = pax_records(data)
                    sparse = b"GNU.sparse." in data
                    long_name = records.get(b"GNU.sparse.name", records.get(b"path", long_name))
                    long_link = records.get(b"linkpath", long_link)
                    told = pax_size(records)
                    long_size = long_size if told is None else told
            elif kind != _PAX_GLOBAL:
                if long_name is not None:
                    batch.long_names[len(sizes)] = long_name
                if kind in _LINKS:
                    target = bytes(buffer[inside + 157 : inside + 257]).split(b"\0", 1)[0]
                    batch.links[len(sizes)] = target if long_link is None else long_link
                elif kind == _SPARSE:
                    batch.sparse.add(len(sizes))
                    size += BLOCK * sparse_blocks(fd, position, buffer[inside + 482])
                long_name = long_link = long_size = None
                if kind in _NO_CONTENT:
                    size = 0
        sizes.append(size)
        position += BLOCK + (size + BLOCK - 1 & -BLOCK)

    # The file ended without an end-of-archive marker: inside a content, inside a header, or just so.
    cut = bool(sizes) and positions[-1] + BLOCK + sizes[-1] > end
    if not _take(batch, scan, fd, keep):
        return
    if cut:
        if len(sizes) - 1 not in batch.not_files:
            scan.cut_member = scan.names.pop()
            scan.contents.pop(len(scan.names), None)
            scan.offsets.pop()
            scan.sizes.pop()
        needed = positions[-1] + BLOCK + sizes[-1]
        scan.damage = f"the file ends at byte {end}, the member at byte {positions[-1]} needs {needed}"
    elif used > base:
        scan.damage = f"the file ends at byte {end}, inside a header"
    else:
        scan.damage = f"the file ends at byte {end} without an end-of-archive marker: it may be cut"


def _leap(
    fd: int, scan: TarScan, keep: int, position: int, layout: list[int], buffer: bytearray, windows: list[memoryview]
) -> int:
    """Take a batch of windows on the guess that each has its headers where the one before had them; the next position.

    Writers repeat themselves: a label, an image, a label, an image. Then only the size of the last member of a window
    has to be known to go on, and everything else is checked for all windows at once. Whatever is not as guessed leaves
    the scan as it was and gives `position` back: the careful way does it again.
    """
    first, last = position, layout[-1]
    starts = []
    for number in range(_WINDOWS):
        if os.preadv(fd, [windows[number]], position) < _WINDOW:
            break
        size_at = number * _WINDOW + last + 124
        try:
            size = int(buffer[size_at : size_at + 11], 8)
        except ValueError:
            break
        if size < 0:
            break
        starts.append(position)
        position += last + BLOCK + (size + BLOCK - 1 & -BLOCK)
    if not starts:
        return first
    places = np.array(layout)
    at = (np.arange(len(starts))[:, None] * _WINDOW + places).ravel()
    table = np.frombuffer(buffer, dtype=np.uint8).reshape(-1, BLOCK)[at // BLOCK]
    digits = table[:, 124:135].astype(np.int64) - 48
    sizes = digits @ (8 ** np.arange(10, -1, -1))
    extended = table[:, 156] == _PAX  # usually a time stamp with fractions, which says nothing of names and sizes
    right = ((digits & ~7) == 0).all() and (np.isin(table[:, 156], _REGULAR) | extended).all()
    if extended.any():
        records = np.frombuffer(buffer, dtype=np.uint8).reshape(-1, BLOCK)[at[extended] // BLOCK + 1].tobytes()
        right &= (sizes[extended] <= BLOCK).all() and not (b"path=" in records or b"size=" in records)
        right &= not extended[len(layout) - 1 :: len(layout)].any()
    ends = places + BLOCK + -(-sizes.reshape(-1, len(layout)) // BLOCK) * BLOCK
    right &= checksums_right(table).all()
    if not right or (ends[:, :-1] != places[1:]).any() or position > scan.file_bytes:
        return first
    batch = _Batch(buffer)
    batch.at, batch.sizes, batch.not_files = at.tolist(), sizes.tolist(), set(np.flatnonzero(extended).tolist())
    batch.positions = (np.array(starts)[:, None] + places).ravel().tolist()
    _take(batch, scan, fd, keep, table)
    return position


def _fill(fd: int, window: memoryview, position: int) -> int:
    """Read into the window, again after a short read; the bytes that came: all of it but at the end of the file."""
    got = os.preadv(fd, [window], position)
    while 0 < got < len(window):
        more = os.preadv(fd, [window[got:]], position + got)
        if more == 0:
            break
        got += more
    return got


def _take(batch: _Batch, scan: TarScan, fd: int, keep: int, checked: np.ndarray | None = None) -> bool:
    """Check the batch's headers and add its files to the scan. False, with `scan.damage` set, at a bad header.

    `checked`: the headers, uint8 [n, 512], where all of them were found right before.
    """
    if not batch.at:
        return True
    count = good = len(batch.at)
    if checked is None:
        table = np.frombuffer(batch.buffer, dtype=np.uint8).reshape(-1, BLOCK)[np.array(batch.at) // BLOCK]
        wrong: list[int] = np.flatnonzero(~checksums_right(table)).tolist()
    else:
        table, wrong = checked, []
    for i in wrong:
        if not checksum_right(batch.header(i)):
            good = i
            scan.damage = f"no valid member header at byte {batch.positions[i]}"
            break
    names: list[bytes] = table[:, :100].copy().view("S100").ravel().tolist()
    for i in np.flatnonzero((table[:, 345] != 0) & (table[:, 262] == 0)).tolist():  # GNU's magic has a space there
        names[i] = batch.header(i)[345:500].split(b"\0", 1)[0] + b"/" + names[i]
    if b"\0" in b"".join(names):  # what follows an inner NUL is left over from an older use of the writer's buffer
        names = [name.split(b"\0", 1)[0] for name in names]
    for i, name in batch.long_names.items():
        names[i] = name
    for i, target in batch.links.items():
        if i < good:
            scan.links.append(TarLink(names[i], target, batch.buffer[batch.at[i] + 156] == _SYMBOLIC))
    scan.sparse += [names[i] for i in sorted(batch.sparse) if i < good]
    if good == count and not batch.not_files:
        offsets, sizes, at = [position + BLOCK for position in batch.positions], batch.sizes, batch.at
    else:
        kept = [i for i in range(good) if i not in batch.not_files]
        others = batch.not_files - batch.sparse
        scan.not_files += sum(batch.buffer[batch.at[i] + 156] not in b"LKxg" for i in others if i < good)
        names = [names[i] for i in kept]
        offsets = [batch.positions[i] + BLOCK for i in kept]
        sizes, at = [batch.sizes[i] for i in kept], [batch.at[i] for i in kept]
    before = len(scan.names)
    whole = memoryview(batch.buffer)
    for number in [i for i, size in enumerate(sizes) if size <= keep]:
        header, size = at[number], sizes[number]
        window_end = header // _WINDOW * _WINDOW + _WINDOW
        content = bytes(whole[header + BLOCK : min(header + BLOCK + size, window_end)])
        scan.contents[before + number] = content if len(content) == size else os.pread(fd, size, offsets[number])
    scan.names += names
    scan.offsets += offsets
    scan.sizes += sizes
    return good == count
