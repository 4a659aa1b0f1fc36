"""Runs a verb in a fork of this process, which has everything loaded.

A case costs milliseconds, and a hang costs no more than its limit. The command writes into a copy of the home, which is
restored after each case.
"""

import contextlib
import gc
import importlib
import os
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MEMORY = 3 << 30  # bytes that a case may take beyond what is loaded
FILE_SIZE = 5 << 30  # of anything that a case writes
# What every command loads that is not light: here, once, rather than in its fork and then here.
HEAVY = ("tarflow.trainer.train", "tarflow.evaluation.worker.evaluate")
LOOKED_AT = 64 << 20  # of a file that is compared
BROKEN = 70  # exit code of a child that ended with an exception


@dataclass
class Ran:
    """What a command did."""

    code: int | None  # None: it did not end in time; negative: killed by a signal
    out: str
    err: str
    seconds: float
    changed: dict[str, bytes | None] = field(default_factory=dict)  # path -> content afterwards, None: it is gone
    modules: list[str] = field(default_factory=list)


Look = dict[str, tuple[int, ...]]  # path -> kind, inode, size, time of change
Action = Sequence[str] | Callable[[], int]


def forked(
    action: Action, folder: Path, limit_s: float, setup: Callable[[], None] | None = None, memory: int | None = MEMORY
) -> Ran:
    """Run `tarflow ACTION`, or a function, in `folder`."""
    notes = Path(tempfile.mkdtemp(prefix="fuzz-"))
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        _in_child(action, folder, notes, setup, memory)
    code = _wait(child, limit_s)
    seconds = time.monotonic() - begin
    out, err = ((notes / name).read_bytes().decode(errors="backslashreplace") for name in ("out", "err"))
    loaded = notes / "modules"
    modules = loaded.read_text().split() if loaded.exists() else []
    shutil.rmtree(notes)
    return Ran(code, out, err, seconds, modules=modules)


def _in_child(action: Action, folder: Path, notes: Path, setup: Callable[[], None] | None, memory: int | None) -> None:
    code = BROKEN
    try:
        os.setsid()
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(notes / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
        for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
            os.environ[name] = str(folder / ".private")
        tempfile.tempdir = None
        if memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = set(sys.modules)
        if setup:
            setup()
        if callable(action):
            code = action()
        else:
            import tarflow.cli

            code = tarflow.cli.main(action)
        (notes / "modules").write_text("\n".join(sorted(set(sys.modules) - before)))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - whatever it is, the oracle judges it
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(child: int, limit_s: float) -> int | None:
    """The exit code; whatever the command has started ends with it."""
    descriptor = os.pidfd_open(child)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    crowd = min(max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), 4.0)
    ended = bool(poll.poll(limit_s * crowd * 1000))
    os.close(descriptor)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


def load(modules: Sequence[str]) -> None:
    """Import here what a command has imported, so that no case has to."""
    for name in modules:
        with contextlib.suppress(BaseException):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that forks share what is loaded


class Workplace:
    """A copy of the home, in which one command after the other runs."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.home, self.folder = home, folder
        if not folder.exists():
            shutil.copytree(home, folder, symlinks=True)
        self.look = look(folder)

    def run(
        self,
        action: Action,
        limit_s: float = 10,
        hurt: Callable[[], None] | None = None,
        setup: Callable[[], None] | None = None,
        memory: int | None = MEMORY,
    ) -> Ran:
        """Damage something, run a command; what it changed. Then everything is as it was."""
        try:
            if hurt:
                hurt()
            before = look(self.folder)
            ran = forked(action, self.folder, limit_s, setup, memory)
            after = look(self.folder)
            for name in sorted(before.keys() | after.keys()):
                if before.get(name) != after.get(name):
                    ran.changed[name] = self._content(name) if name in after else None
            return ran
        finally:
            self.restore()

    def _content(self, name: str) -> bytes:
        path = self.folder / name
        return path.read_bytes() if path.is_file() and path.stat().st_size < LOOKED_AT else b"(no file)"

    def restore(self) -> None:
        now = look(self.folder)
        changed = [name for name in now.keys() | self.look.keys() if now.get(name) != self.look.get(name)]
        for name in changed:
            _remove(self.folder / name)
        for name in sorted(changed):
            if name in self.look:
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.home / name, path, follow_symlinks=False)
                self.look[name] = _as_seen(os.lstat(path))
        for folder, _, _ in os.walk(self.folder, topdown=False):
            if not os.listdir(folder) and not (self.home / os.path.relpath(folder, self.folder)).exists():
                os.rmdir(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):  # not where the folder that it is in has become a file
        path.unlink()


def _as_seen(info: os.stat_result) -> tuple[int, ...]:
    return stat.S_IFMT(info.st_mode), info.st_ino, info.st_size, info.st_mtime_ns


def look(folder: Path) -> Look:
    """Every file below a folder, without opening any."""
    found: Look = {}
    inside = [""]
    while inside:
        at = inside.pop()
        for entry in os.scandir(folder / at):
            if entry.is_dir(follow_symlinks=False):
                inside.append(f"{at}{entry.name}/")
            else:
                found[at + entry.name] = _as_seen(entry.stat(follow_symlinks=False))
    return found
