"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import os
import zlib
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


def crc32(path: Path) -> int:
    """Checksum of a file's content, read in pieces."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value
