"""What a file system cannot do: known by its error numbers, and said once, with the name of the file system."""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

# What a call answers where it is not provided at all, or refused for this kind of file.
NOT_PROVIDED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_MOUNTS = Path("/proc/self/mounts")
_said: set[tuple[str, str]] = set()


def file_system(path: str | Path) -> str:
    """The file system that a path lies on, such as `nfs4 at /home`; the path itself where the system does not tell."""
    here = os.path.realpath(path)
    best = ("", "")
    try:
        for line in _MOUNTS.read_text(errors="replace").splitlines():
            _, point, kind, *_ = line.split(" ")
            point = point.replace("\\040", " ")
            inside = point == "/" or here == point or here.startswith(point + "/")
            if inside and len(point) >= len(best[0]):  # of two mounts in one place the later one counts
                best = (point, kind)
    except (OSError, ValueError):
        pass
    return f"{best[1]} at {best[0]}" if best[0] else f"that of {here}"


def note_once(path: str | Path, lack: str, error: OSError, consequence: str) -> None:
    """Say on stderr that the file system of `path` lacks something; the same lack of the same one is not said again."""
    where = file_system(path)
    if (where, lack) in _said:
        return
    _said.add((where, lack))
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    with suppress(OSError):
        print(f"note: the file system ({where}) has no {lack} ({name}: {error.strerror}): {consequence}",
              file=sys.stderr, flush=True)  # fmt: skip
