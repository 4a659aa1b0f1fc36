"""The plain scan of a tar: one header after the other, each read and understood by itself.

It says what a scan has to find. Indexing uses `fast`, which must find exactly the same and is several times as fast.
"""

from __future__ import annotations

import os

from tarflow.data_pipeline.index.tar.headers import (
    BLOCK,
    END_MARK,
    EXTENDED,
    HARD_LINK,
    LINK_TARGET,
    MAX_EXTENDED,
    NO_CONTENT,
    PAX_GLOBAL,
    REGULAR,
    SPARSE,
    SYMBOLIC_LINK,
    TYPE,
    Extension,
    checksum_ok,
    extend,
    name_of,
    padded,
    size_of,
    sparse_map_bytes,
    text_of,
)
from tarflow.data_pipeline.index.tar.links import TarLink
from tarflow.data_pipeline.index.tar.members import TarScan


def plain_scan(fd: int, scan: TarScan, keep: int) -> None:
    """Fill `scan` with the members of the open tar; contents of up to `keep` bytes are kept. Raises OSError."""
    position = 0
    extension: Extension | None = None
    while position < scan.file_bytes:
        header = os.pread(fd, BLOCK, position)
        if header == END_MARK:
            return
        if len(header) < BLOCK:
            break
        size = size_of(header)
        if size < 0 or not checksum_ok(header):
            scan.damaged_header(position)
            return
        kind, offset = header[TYPE], position + BLOCK

        if kind in EXTENDED:
            extension = extend(extension, kind, os.pread(fd, min(size, MAX_EXTENDED), offset))
        elif kind != PAX_GLOBAL:
            said, extension = extension or Extension(), None
            name = name_of(header) if said.name is None else said.name
            size = _size_of_content(fd, position, header, size, said)
            whole = offset + size <= scan.file_bytes
            if kind == SPARSE or (said.sparse and kind in REGULAR):
                scan.sparse.append(name)
            elif kind not in REGULAR:
                scan.not_files += 1
            elif not whole:
                scan.cut_member = name
            else:
                if size <= keep:
                    scan.contents[len(scan.names)] = os.pread(fd, size, offset)
                scan.names.append(name)
                scan.offsets.append(offset)
                scan.sizes.append(size)
            if kind in (HARD_LINK, SYMBOLIC_LINK):
                target = text_of(header[LINK_TARGET]) if said.link_target is None else said.link_target
                scan.links.append(TarLink(name, target, kind == SYMBOLIC_LINK))

        if offset + size > scan.file_bytes:
            scan.damaged_content(position, size)
            return
        position = offset + padded(size)
    scan.damaged_end(position)


def _size_of_content(fd: int, position: int, header: bytes, size: int, said: Extension) -> int:
    """Bytes between a member's header and its padding; `size` is that of the header."""
    kind = header[TYPE]
    if kind in NO_CONTENT:
        return 0
    if kind == SPARSE:
        return size + sparse_map_bytes(fd, position, header)
    return said.size if said.size is not None and kind in REGULAR else size
