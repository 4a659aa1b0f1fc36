"""Builds `native.c` and its header with the system's C compiler at first use, into a folder of this user's own.

The name of the library tells source, compiler, options and processor: on a home directory that several kinds of nodes share,
each kind has its own.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path

from tarflow.errors import UserError
from tarflow.file_systems import private_folder
from tarflow.files import open_to_read
from tarflow.leases import unique_name

SOURCES = ("native.c", "native_vectors.h")
FOLDER = "TARFLOW_COMPILED_DIR"
BASE = ("-O3", "-std=gnu11", "-shared", "-fPIC")
# From the best to what any compiler takes: without OpenMP it computes in one thread.
OPTIONS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
LONGEST_S = 120
WAY_OUT = f"set {FOLDER} to a folder of your own"


class NotBuiltError(Exception):
    """There is no compiler, or it failed; the message says which."""


def library() -> ctypes.CDLL:
    """The compiled engine. Raises NotBuiltError, or UserError for a folder in which others could have put anything."""
    found = outcome()
    if isinstance(found, Exception):
        raise found
    return found


@cache
def outcome() -> ctypes.CDLL | NotBuiltError | UserError:
    """The library, or why there is none: tried once in a process."""
    try:
        return _found_or_built()
    except (NotBuiltError, UserError) as error:
        return error


def _found_or_built() -> ctypes.CDLL:
    compiler = _compiler()
    folder = private_folder(_folder(), WAY_OUT)
    sources = {name: _source(name) for name in SOURCES}
    identity = repr((BASE, OPTIONS, _version(compiler), _processor())).encode()
    key = hashlib.sha256(b"".join(sources.values()) + identity).hexdigest()[:24]
    path = folder / f"native-{key}.so"
    if not path.is_file():
        _build(compiler, sources, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotBuiltError(f"{path} cannot be loaded: {error}") from None


def _source(name: str) -> bytes:
    with open_to_read(Path(str(resources.files("tarflow.models.sampling").joinpath(name)))) as file:
        return file.read()


def _folder() -> Path:
    if given := os.environ.get(FOLDER):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # a user without a home
        return Path(base) / "tarflow-compiled" if base else Path.home() / ".cache" / "tarflow-compiled"
    return Path(tempfile.gettempdir()) / f"tarflow-compiled-{os.geteuid()}"


def _compiler() -> str:
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise NotBuiltError("there is no C compiler: cc, gcc and clang are not found")


def _version(compiler: str) -> str:
    try:
        return subprocess.run(  # noqa: S603  (the system's compiler)
            [compiler, "--version"], capture_output=True, text=True, timeout=LONGEST_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NotBuiltError(f"{compiler} --version failed: {error}") from None


def _processor() -> tuple[str, ...]:
    """What decides the instructions that a library built here may hold."""
    lines: list[str] = []
    with suppress(OSError), open_to_read("/proc/cpuinfo") as file:
        for line in file.read().decode(errors="replace").splitlines():
            if line.startswith(("model name", "flags", "Features", "CPU part")) and line not in lines:
                lines.append(line)
    return (platform.machine(), *lines)


def _build(compiler: str, sources: dict[str, bytes], path: Path) -> None:
    said = ""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{unique_name()}.") as folder:
        text, out = Path(folder) / SOURCES[0], Path(folder) / "native.so"
        for name, source in sources.items():
            (Path(folder) / name).write_bytes(source)
        for options in OPTIONS:
            try:
                done = subprocess.run(  # noqa: S603
                    [compiler, *BASE, *options, str(text), "-o", str(out), "-lm"],
                    capture_output=True, text=True, errors="replace", timeout=LONGEST_S, check=False,
                )  # fmt: skip
            except (OSError, subprocess.SubprocessError) as error:
                raise NotBuiltError(f"{compiler} failed: {error}") from None
            if done.returncode == 0:
                os.replace(out, path)  # in one step: another process may be building the same
                return
            said = said or done.stderr.strip()[:300]
    raise NotBuiltError(f"{compiler} does not compile native.c: {said}")
