"""Scan a tar: open it, find its members, and say what is wrong with the file.

Reads ustar, GNU and pax headers and follows links to members of the same tar. Damage is reported instead of raised, so that
the caller can apply its policy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.tar.fast import fast_scan
from tarflow.data_pipeline.index.tar.members import TarScan
from tarflow.files import open_regular

SMALL = 256  # contents up to this size are kept as they pass by: label members
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def scan_tar(path: Path, keep: int = SMALL, by: Callable[[int, TarScan, int], None] = fast_scan) -> TarScan:
    """The members of the tar at `path`; contents of up to `keep` bytes are kept. `by`: the scan of the headers.

    Raises DataError when the file cannot be read or is compressed (offsets into it would mean nothing).
    """
    try:
        fd = open_regular(path)
    except OSError as err:
        raise DataError(f"cannot open shard {path}: {err.strerror}") from None
    try:
        scan = TarScan(path, os.fstat(fd).st_size)
        try:
            by(fd, scan, keep)
        except OSError as err:
            raise DataError(f"cannot read shard {path}: {err.strerror}") from None
        if not scan.names and scan.damage and scan.cut_member is None:
            _explain_nothing(fd, scan)
        scan.follow_links()
        return scan
    finally:
        os.close(fd)


def _explain_nothing(fd: int, scan: TarScan) -> None:
    """Say more of a file that is damaged before its first member: it may not be a tar at all."""
    head = os.pread(fd, 8, 0)
    for magic, how in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"shard {scan.path} is {how}-compressed: reading by offset needs a plain tar, unpack it")
    scan.damage = f"not a tar file ({scan.damage})" if scan.file_bytes else "the file is empty (0 bytes)"
