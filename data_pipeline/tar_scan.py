"""One pass over the headers of a tar file: which members it holds and where their bytes lie.

Reads ustar, GNU (long names, base-256 sizes) and pax headers, touches member contents only where asked, and reports
damage instead of raising, so that the caller can apply its policy. Several times faster than `tarfile`, which builds
an object per member.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError

BLOCK = 512
_ZERO = bytes(BLOCK)
_WINDOW = 4096  # one read often serves the header of a small text member, its content and the next header
_CHECK_EVERY = 4096  # headers whose checksums are verified together
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass
class TarScan:
    """What a scan found. `names`, `offsets` (of the content) and `sizes` in bytes run in parallel, regular files only.

    `contents` holds the bytes of the members that `wanted` asked for, by position in `names`. `damage` says what is
    wrong with the file, or is None; `cut_member` names the member that the damage hit, where one is known.
    """

    file_bytes: int
    names: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    contents: dict[int, bytes] = field(default_factory=dict)
    not_files: int = 0
    damage: str | None = None
    cut_member: bytes | None = None


def scan_tar(path: Path, wanted: tuple[bytes, ...] = (), max_content: int = 1 << 20) -> TarScan:
    """Scan the headers of the tar at `path`; keep the contents of members whose lower-case name ends in `wanted`.

    Raises DataError when the file cannot be opened or is compressed (offsets into it would mean nothing).
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as err:
        raise DataError(f"cannot open shard {path}: {err.strerror}") from None
    try:
        return _scan(path, fd, wanted, max_content)
    finally:
        os.close(fd)


def _scan(path: Path, fd: int, wanted: tuple[bytes, ...], max_content: int) -> TarScan:
    end = os.fstat(fd).st_size
    scan = TarScan(file_bytes=end)
    names, offsets, sizes = scan.names, scan.offsets, scan.sizes
    headers: list[bytes] = []  # regular members only; verified in batches
    verified = 0
    position = 0
    window = b""
    window_start = 0
    long_name: bytes | None = None
    long_size: int | None = None
    while True:
        inside = position - window_start
        header = window[inside : inside + BLOCK]
        if len(header) < BLOCK:
            window = os.pread(fd, _WINDOW, position)
            window_start = position
            header = window[:BLOCK]
            if len(header) < BLOCK:
                scan.damage = (
                    f"the file ends inside a header at byte {end}"
                    if header
                    else f"the file ends at byte {end} without an end-of-archive marker"
                )
                break
        if header[0] == 0 and header == _ZERO:
            break
        size = _number(header[124:136])
        kind = header[156]
        if size is None or (not names and not _checksum_right(header)):
            scan.damage = _not_a_header(header, position)
            break
        data = position + BLOCK
        if kind in (48, 0, 55):  # '0', NUL and '7': regular files
            if long_name is not None:
                name = long_name
                long_name = None
            else:
                name = header[:100].split(b"\0", 1)[0]
                if header[345] and header[257:263] == b"ustar\0":
                    name = header[345:500].split(b"\0", 1)[0] + b"/" + name
            if long_size is not None:
                size = long_size
                long_size = None
            if data + size > end:
                headers.append(header)
                if _checksum_right(header):
                    scan.cut_member = name
                    scan.damage = f"the file ends at byte {end}, its member needs {data + size}"
                else:
                    scan.damage = _not_a_header(header, position)
                break
            if wanted and size <= max_content and name.lower().endswith(wanted):
                start = data - window_start
                content = window[start : start + size]
                scan.contents[len(names)] = content if len(content) == size else os.pread(fd, size, data)
            names.append(name)
            offsets.append(data)
            sizes.append(size)
            headers.append(header)
            if len(headers) >= _CHECK_EVERY:
                if _drop_from_bad_checksum(scan, headers, verified):
                    return scan
                verified += len(headers)
                headers.clear()
        elif kind in (76, 120, 103, 75):  # 'L' long name, 'x' and 'g' pax, 'K' long link: they describe a member
            if not _checksum_right(header) or data + size > end:
                scan.damage = f"bad or cut extended header at byte {position}"
                break
            if kind == 76:
                long_name = os.pread(fd, size, data).split(b"\0", 1)[0]
            elif kind == 120:
                records = _pax(os.pread(fd, size, data))
                long_name = records.get(b"path", long_name)
                long_size = int(records[b"size"]) if b"size" in records else long_size
        else:
            if not _checksum_right(header):
                scan.damage = _not_a_header(header, position)
                break
            scan.not_files += 1  # folders, links, devices
            long_name = long_size = None
            if kind in (49, 50, 53):
                size = 0
        position = data + (size + BLOCK - 1) // BLOCK * BLOCK
    whole = len(names) - verified  # a cut member's header is last in `headers` but not among the names
    _drop_from_bad_checksum(scan, headers[:whole], verified)
    if not names and scan.damage:
        head = os.pread(fd, 8, 0)
        for magic, how in _COMPRESSED.items():
            if head.startswith(magic):
                raise DataError(f"shard {path} is compressed ({how}); reading by offset needs a plain tar: unpack it first")
        if scan.cut_member is None:
            scan.damage = "the file is empty (0 bytes)" if end == 0 else f"not a tar file ({scan.damage})"
    return scan


def _number(field: bytes) -> int | None:
    """A size field: octal text, or base-256 when the top bit is set. None when it is neither."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << 95) - 1)
        return value if value < 1 << 62 else None
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return None


def _checksum_right(header: bytes) -> bool:
    try:
        stored = int(header[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    rest = header[:148] + b"        " + header[156:]
    # Some old writers summed signed bytes.
    return stored in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest))


def _drop_from_bad_checksum(scan: TarScan, headers: list[bytes], first: int) -> bool:
    """Verify a batch of headers at once; at the first bad one forget it and all after it. True when one was bad."""
    if not headers:
        return False
    table = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, BLOCK)
    # 32-bit words would overflow nothing here, but uint8 sums need a wide accumulator.
    sums = table.sum(axis=1, dtype=np.int64) - table[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * 32
    for i, (header, total) in enumerate(zip(headers, sums.tolist())):
        try:
            right = int(header[148:156].strip(b"\0 ") or b"0", 8) == total
        except ValueError:
            right = False
        if not right and not _checksum_right(header):
            at = first + i
            scan.damage = _not_a_header(header, scan.offsets[at] - BLOCK)
            scan.cut_member = None
            del scan.names[at:], scan.offsets[at:], scan.sizes[at:]
            scan.contents = {i: content for i, content in scan.contents.items() if i < at}
            return True
    return False


def _not_a_header(header: bytes, position: int) -> str:
    return f"no valid member header at byte {position}"


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Records `length key=value newline`; a malformed rest is ignored, as other readers do."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        length, space, _ = data[position : position + 24].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            break
        key, _, value = data[position + len(length) + 1 : position + int(length) - 1].partition(b"=")
        records[key] = value
        position += int(length)
    return records
