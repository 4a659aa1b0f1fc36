"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import os
import zlib
from contextlib import suppress
from pathlib import Path


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable (a rename is only safe once its directory is on disk)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Make every file below a directory, and their names, durable."""
    for folder, _, names in os.walk(path):
        for name in names:
            with open(Path(folder, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_dir(Path(folder))


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content in one step: temporary sibling, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves, the next write replaces
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


class Lines:
    """Appends lines to a file, each in one write. A full disk costs lines, never the run that writes them."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._whole = True  # the last line came to its end

    def write(self, line: str) -> None:
        data = ("" if self._whole else "\n").encode() + line.encode() + b"\n"
        with suppress(OSError):
            written = os.write(self._descriptor, data)
            self._whole = written == len(data) or (self._whole and not written)

    def close(self) -> None:
        os.close(self._descriptor)


def crc32(path: Path) -> int:
    """Checksum of a file's content, read in pieces."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value
