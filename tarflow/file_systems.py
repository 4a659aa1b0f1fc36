"""Features that a file system lacks: recognized by error number, noted once, with the name of the file system."""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

# Errors of a call that is not provided, or not for this kind of file.
NOT_PROVIDED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_MOUNTS = Path("/proc/self/mounts")
_said: set[tuple[str, str]] = set()


def file_system(path: str | Path) -> str:
    """The file system that a path lies on, such as `nfs4 at /home`; the path itself if unknown."""
    here = os.path.realpath(path)
    best = ("", "")
    try:
        for line in _MOUNTS.read_text(errors="replace").splitlines():
            _, point, kind, *_ = line.split(" ")
            point = point.replace("\\040", " ")
            inside = point == "/" or here == point or here.startswith(point + "/")
            if inside and len(point) >= len(best[0]):  # of several mounts at one place the last one counts
                best = (point, kind)
    except (OSError, ValueError):
        pass
    return f"{best[1]} at {best[0]}" if best[0] else f"that of {here}"


def note_once(path: str | Path, lack: str, error: OSError, consequence: str) -> None:
    """Print a note that the file system of `path` lacks something; once for each file system and feature."""
    where = file_system(path)
    if (where, lack) in _said:
        return
    _said.add((where, lack))
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    with suppress(OSError):
        print(f"note: the file system ({where}) has no {lack} ({name}: {error.strerror}): {consequence}",
              file=sys.stderr, flush=True)  # fmt: skip
