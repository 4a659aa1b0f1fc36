"""One pass over the headers of a tar file: which members it holds and where their bytes lie.

Reads ustar, GNU (long names, base-256 sizes) and pax headers and reports damage instead of raising, so that the caller
can apply its policy. The walk from header to header only reads sizes; names and checksums are then taken from all
headers at once with NumPy, which makes a scan about as fast as reading the headers alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError

BLOCK = 512
_ZERO = bytes(BLOCK)
_WINDOW = 4096  # one read often serves an extended header, the header, a small text member and the next header
_SMALL = 256  # contents up to this size are kept as they pass by: label members
_BATCH = 8192  # headers that are checked together; bounds the memory of a scan
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"LKxg"
_NO_CONTENT = b"123456"  # links, devices, folders, pipes: whatever their size field says, no content follows


@dataclass
class TarScan:
    """What a scan found. `names`, `offsets` (of the content) and `sizes` in bytes run in parallel, regular files only.

    `contents` holds the bytes of small members by position in `names`. `damage` says what is wrong with the file, or
    is None; `cut_member` names the member that the damage hit, where one is known.
    """

    path: Path
    file_bytes: int = 0
    names: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    contents: dict[int, bytes] = field(default_factory=dict)
    not_files: int = 0
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


def scan_tar(path: Path) -> TarScan:
    """Scan the headers of the tar at `path`.

    Raises DataError when the file cannot be opened or is compressed (offsets into it would mean nothing).
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as err:
        raise DataError(f"cannot open shard {path}: {err.strerror}") from None
    try:
        scan = TarScan(path, os.fstat(fd).st_size)
        _walk(fd, scan)
        if not scan.names and scan.damage and scan.cut_member is None:
            head = os.pread(fd, 8, 0)
            for magic, how in _COMPRESSED.items():
                if head.startswith(magic):
                    raise DataError(f"shard {path} is {how}-compressed: reading by offset needs a plain tar, unpack it")
            scan.damage = f"not a tar file ({scan.damage})" if scan.file_bytes else "the file is empty (0 bytes)"
        return scan
    finally:
        os.close(fd)


class _Batch:
    """Headers met since the last check. `files[i]` is False for extended headers and everything without content."""

    def __init__(self) -> None:
        self.headers: list[bytes] = []
        self.positions: list[int] = []
        self.sizes: list[int] = []
        self.files: list[bool] = []
        self.long_names: dict[int, bytes] = {}
        self.contents: dict[int, bytes] = {}


def _walk(fd: int, scan: TarScan) -> None:
    """Go from header to header; hand batches of them to `_take`."""
    end = scan.file_bytes
    batch = _Batch()
    position = 0
    window = b""
    start = 0
    long_name: bytes | None = None
    long_size: int | None = None
    while True:
        inside = position - start
        header = window[inside : inside + BLOCK]
        if len(header) < BLOCK:
            window = os.pread(fd, _WINDOW, position)
            start, inside = position, 0
            header = window[:BLOCK]
            if len(header) < BLOCK:
                break
        if header[0] == 0 and header == _ZERO:
            _take(batch, scan)
            return
        try:
            size = int(header[124:135], 8)
            if size < 0:
                raise ValueError
        except ValueError:
            size = _odd_size(header[124:136])
            if size < 0:
                if _take(batch, scan):
                    scan.damage = f"no valid member header at byte {position}"
                return
        kind = header[156]
        content = position + BLOCK
        number = len(batch.headers)
        batch.headers.append(header)
        batch.positions.append(position)
        if kind == 48 or kind == 0 or kind == 55:  # '0', NUL and '7': regular files
            if long_name is not None:
                batch.long_names[number] = long_name
                long_name = None
            if long_size is not None:
                size, long_size = long_size, None
            if size <= _SMALL:
                small = window[inside + BLOCK : inside + BLOCK + size]
                batch.contents[number] = small if len(small) == size else os.pread(fd, size, content)
            batch.files.append(True)
        else:
            batch.files.append(False)
            if kind in (_PAX, _LONG_NAME):
                data = window[inside + BLOCK : inside + BLOCK + size]
                if len(data) < size:
                    data = os.pread(fd, min(size, 1 << 20), content)
                if kind == _LONG_NAME:
                    long_name = data.split(b"\0", 1)[0]
                elif b"path=" in data or b"size=" in data:
                    records = _pax(data)
                    long_name = records.get(b"path", long_name)
                    if records.get(b"size", b"").isdigit():
                        long_size = int(records[b"size"])
            elif kind not in (_PAX_GLOBAL, _LONG_LINK):
                long_name = long_size = None
                if kind in _NO_CONTENT:
                    size = 0
        batch.sizes.append(size)
        position = content + (size + BLOCK - 1) // BLOCK * BLOCK
        if number + 1 >= _BATCH and content + size <= end:
            if not _take(batch, scan):
                return
            batch = _Batch()

    # The file ended without an end-of-archive marker: inside a content, inside a header, or just so.
    cut = bool(batch.sizes) and batch.positions[-1] + BLOCK + batch.sizes[-1] > end
    if not _take(batch, scan):
        return
    if cut:
        if batch.files[-1]:
            scan.cut_member = scan.names.pop()
            scan.contents.pop(len(scan.names), None)
            scan.offsets.pop()
            scan.sizes.pop()
        needed = batch.positions[-1] + BLOCK + batch.sizes[-1]
        scan.damage = f"the file ends at byte {end}, the member at byte {batch.positions[-1]} needs {needed}"
    elif header:
        scan.damage = f"the file ends at byte {end}, inside a header"
    else:
        scan.damage = f"the file ends at byte {end} without an end-of-archive marker: it may be cut"


def _take(batch: _Batch, scan: TarScan) -> bool:
    """Check the batch's headers and add its files to the scan. False, with `scan.damage` set, at a bad header."""
    if not batch.headers:
        return True
    table = np.frombuffer(b"".join(batch.headers), dtype=np.uint8).reshape(-1, BLOCK)
    good = len(batch.headers)
    # The sum runs over all bytes with the eight of the checksum itself counted as spaces.
    sums = table.sum(axis=1, dtype=np.uint32) - table[:, 148:156].sum(axis=1, dtype=np.uint32) + np.uint32(8 * 32)
    stored = table[:, 148:154].copy().view("S6").ravel().tolist()
    for i, (digits, total) in enumerate(zip(stored, sums.tolist())):
        try:
            if int(digits, 8) == total:
                continue
        except ValueError:
            pass
        if not _checksum_right(batch.headers[i]):
            good = i
            scan.damage = f"no valid member header at byte {batch.positions[i]}"
            break
    names = table[:, :100].copy().view("S100").ravel().tolist()
    prefixed = np.flatnonzero((table[:, 345] != 0) & (table[:, 262] == 0)).tolist()  # GNU's magic has a space there
    for i in prefixed:
        names[i] = batch.headers[i][345:500].split(b"\0", 1)[0] + b"/" + names[i]
    # numpy strips only trailing NULs; what follows an inner NUL is left over from an older use of the buffer
    for i in np.flatnonzero((np.diff((table[:, :100] == 0).astype(np.int8), axis=1) < 0).any(axis=1)).tolist():
        names[i] = names[i].split(b"\0", 1)[0]
    for i, name in batch.long_names.items():
        names[i] = name
    kinds = table[:, 156].tolist()
    for i in range(good):
        if batch.files[i]:
            if i in batch.contents:
                scan.contents[len(scan.names)] = batch.contents[i]
            scan.names.append(names[i])
            scan.offsets.append(batch.positions[i] + BLOCK)
            scan.sizes.append(batch.sizes[i])
        elif kinds[i] not in b"LKxg":
            scan.not_files += 1
    return good == len(batch.headers)


def _odd_size(field: bytes) -> int:
    """A size field that is no eleven octal digits: padded with NULs or spaces, or base-256. -1 when it is neither."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << 95) - 1)
        return value if value < 1 << 62 else -1
    try:
        return max(-1, int(field.strip(b"\0 ") or b"0", 8))
    except ValueError:
        return -1


def _checksum_right(header: bytes) -> bool:
    """The slow and tolerant check: odd padding of the field, and old writers that summed signed bytes."""
    try:
        stored = int(header[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    rest = header[:148] + b" " * 8 + header[156:]
    return stored in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest))


def _pax(data: bytes) -> dict[bytes, bytes]:
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
