"""Durable writes: a crash leaves the old file or the new one, never half of one. Files of lines survive a torn last line.

Nothing is created or written through a link. Otherwise anyone who can put a name into a folder (the stranger who made a run
directory, a colleague with write access) could redirect a write to any file of the user. A link is replaced like a file would
be; appending to one is an error. Parent folders may be links (a run directory on scratch, say), and reading follows links.
"""

import errno
import glob
import json
import os
import shutil
import stat
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from tarflow.file_systems import NOT_PROVIDED, note_once


def open_own(path: Path, flags: int, mode: int = 0o666) -> int:
    """A descriptor of a regular file, created if `flags` say so. Never blocks.

    Raises OSError as os.open does: ELOOP for a link, ENXIO for a pipe, a device or a folder.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), str(path))
    return descriptor


def open_regular(path: Path | str) -> int:
    """A descriptor for reading a regular file, through links. Never blocks, as a pipe in its place would.

    Raises OSError as os.open does; with EINVAL for whatever else has the name.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor


def open_to_read(path: Path | str) -> BufferedReader:
    """A regular file, open for reading its bytes. Every file that someone else may have made is opened so.

    Raises OSError as `open_regular` does.
    """
    return os.fdopen(open_regular(path), "rb")


def read_bytes(path: Path | str) -> bytes:
    """All bytes of a regular file. Raises OSError as `open_regular` does."""
    with open_to_read(path) as file:
        return file.read()


def read_up_to(path: Path | str, most: int) -> bytes:
    """At most `most` bytes of a regular file, and one more where it holds more.

    Raises OSError as `open_regular` does, and for a file that does not fit into memory. Room is made for as many bytes as a
    read may give: for those that are there, not for the most that would be taken.
    """
    with open_to_read(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return file.read(min(size, most) + 1)
        except MemoryError:
            raise OSError(errno.ENOMEM, f"no memory for its {size:,} bytes", os.fspath(path)) from None


def create(path: Path, mode: int = 0o666) -> int:
    """A descriptor of a new, empty file, open for writing.

    A file or link of that name, left by a kill or planted by someone, is removed first.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags, mode)
    except FileExistsError:
        os.unlink(path)
        return os.open(path, flags, mode)


def create_empty(path: Path) -> None:
    """Create an empty file, like `create`, for a library that opens it by name."""
    os.close(create(path))


def fill(path: Path, text: str) -> None:
    """Replace the text of a file in place, keeping its inode (a held lock, say)."""
    descriptor = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def write_new(path: Path, data: str | bytes) -> None:
    """Create a file, like `create`, with this text or these bytes."""
    with open(create(path), "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def refuse_link(path: Path) -> None:
    """Raise OSError ELOOP if the path is a link."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def make_folder(root: Path, *below: str) -> Path:
    """Make a folder and the nested folders `below` it, unless they exist; returns the last one.

    `root` was named by the user and may be a link. Raises OSError ELOOP if one below it is a link.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name in below:
        root = root / name
        refuse_link(root)
        root.mkdir(exist_ok=True)
        refuse_link(root)
    return root


def fsync_path(path: Path) -> None:
    """Make a file's content, or the names in a directory, durable: a rename is only safe once its directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fsync_file(descriptor, path)
    finally:
        os.close(descriptor)


def fsync_file(descriptor: int, path: Path) -> None:
    """The same for an open file or directory. A file system without fsync is noted once; a write error is raised."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_PROVIDED:
            error.filename = str(path)
            raise
        what = "directories" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "files"
        note_once(path, f"fsync of {what}", error, "after a power cut the newest of them may be missing")


def fsync_tree(path: Path) -> None:
    """Make every file below a directory, and their names, durable."""
    for folder, _, names in os.walk(path):
        for name in names:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """Paths below a folder that match, sorted, hidden names included.

    Another process may remove the folder or parts of it meanwhile: what is gone is not listed. (`Path.glob` raises then,
    before Python 3.13.)
    """
    return sorted(folder / name for name in glob.glob(pattern, root_dir=folder, include_hidden=True))


def check_writable(folder: Path) -> None:
    """Raise OSError if `folder` or a file in it cannot be created. Leaves nothing behind."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling of `path`, make it durable and put it in place in one step.

    The sibling's name is random, so several processes, on several machines, may write the same file.
    """
    _replace(path, path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"), write)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Replace a text file in one step.

    `shared`: several processes may write it. Otherwise the temporary file has a fixed name, so that the next write replaces
    what a kill left of the one before.
    """
    name = f".{path.name}.{uuid.uuid4().hex[:12]}.tmp" if shared else f".{path.name}.tmp"
    _replace(path, path.with_name(name), lambda temporary: fill(temporary, text))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file, indented; several processes may write it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", shared=True)


def _replace(path: Path, temporary: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with discarded(temporary), naming(path):
        create_empty(temporary)
        mode = temporary.stat().st_mode
        try:
            write(temporary)
        except Exception as error:
            if not isinstance(error, OSError):
                _ask_the_disk(temporary)
            raise
        if temporary.lstat().st_mode != mode:  # the library made it private to the user
            with suppress(OSError):
                temporary.chmod(mode)
        fsync_path(temporary)
        os.replace(temporary, path)
    fsync_path(path.parent)


@contextmanager
def discarded(temporary: Path) -> Iterator[None]:
    """Remove a temporary file afterwards, whatever happens; a failure to do so must not hide the error that is raised."""
    try:
        yield
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make system errors name this path: a failed write names none, and users do not know the temporary one."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _ask_the_disk(path: Path) -> None:
    """Raise the system's error if the disk is full: a library may have replaced it by an error of its own."""
    with open(open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        file.write(bytes(1 << 16))
        file.flush()
        os.fsync(file.fileno())


def discard(path: Path) -> str | None:
    """Remove an obsolete directory as far as possible; returns why some of it is left, or None if it is gone.

    Links are removed, in it or in its place, and never followed. A file that is held open over NFS, or a directory without
    write permission, is not an error: the caller logs it and tries again later.
    """
    try:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except FileNotFoundError:
        shutil.rmtree(path, ignore_errors=True)  # another process is removing it, too
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)  # the rest of it
        if os.path.lexists(path):
            return f"{error.strerror or error}: {error.filename or path}"
    return None


def free_name(path: Path) -> Path:
    """The path, or the first of `path-2`, `path-3` ... that does not exist."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def publish_dir(temporary: Path, final: Path) -> bool:
    """Rename a finished directory into place; False if there is one already (another process was faster)."""
    fsync_tree(temporary)
    try:
        os.rename(temporary, final)
    except OSError:
        if not final.exists():
            raise
        discard(temporary)
        return False
    return True


def replace_dir(temporary: Path, final: Path) -> None:
    """Rename a finished directory into place; an existing one is renamed away and removed last."""
    fsync_tree(temporary)
    old = final.with_name(final.name + ".old")
    discard(old)
    old = free_name(old)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    fsync_path(final.parent)
    discard(old)


def put_once(temporary: Path, final: Path) -> None:
    """Move a finished file into place, unless one is there."""
    fsync_path(temporary)
    try:
        os.link(temporary, final)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links: the content is the same, so replacing is harmless
        if not temporary.exists():
            raise
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


class LineWriter:
    """Appends lines to a file, each in one write. A full disk loses lines and never stops the run.

    A torn line, left by a full disk or a kill, is terminated first, so that it does not spoil the next.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._whole = ends_whole(self._descriptor)  # the last line is complete

    def write(self, line: str) -> None:
        """Append a line, without its end; errors are ignored."""
        data = ("" if self._whole else "\n").encode() + line.encode() + b"\n"
        with suppress(OSError):
            written = os.write(self._descriptor, data)
            self._whole = written == len(data) or (self._whole and not written)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def ends_whole(descriptor: int) -> bool:
    """Whether a file that is open for reading ends with the end of a line, or is empty."""
    size = os.fstat(descriptor).st_size
    return not size or os.pread(descriptor, 1, size - 1) == b"\n"


def append_line(path: Path, line: str, *, durable: bool = False) -> None:
    """Append a line to a file that others append to as well, in one write, so lines do not mix.

    A torn line is terminated first. Raises OSError if the line cannot be written completely, or the path is a link.
    """
    descriptor = open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        data = ("" if ends_whole(descriptor) else "\n").encode() + line.encode() + b"\n"
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if durable:
            fsync_file(descriptor, path)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    """CRC-32 of a file's content."""
    value = 0
    with open_to_read(path) as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value
