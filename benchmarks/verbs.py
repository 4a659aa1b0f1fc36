"""The product's own verbs as processes, with the time they take: what the long benchmarks are made of.

CPU seconds are those of the verb's process and of its workers. They say how much was computed on a machine that others use as
well, where wall time does not. For that a verb computes in one thread, unless OMP_NUM_THREADS says otherwise: several wait for
each other by spinning, which beside other work multiplies the seconds by ten.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINISHED, STOPPED = 0, 75  # exit codes of `tarflow train` after which nothing is wrong
_PATIENCE_S = 300.0  # for a run that was asked to stop: it ends its step and saves
_SHOWN = 1500  # characters of a failed verb's output


@dataclass(frozen=True)
class Ran:
    """What a verb took: its exit code, CPU and wall seconds."""

    code: int
    cpu_s: float
    wall_s: float


class VerbFailedError(RuntimeError):
    """A verb ended in an error; the message has the end of its output."""


def run_verb(words: Iterable[object], log: Path, limit_s: float | None = None) -> Ran:
    """`tarflow WORDS`, its output appended to `log`; after `limit_s` it is asked to stop (SIGTERM) and waited for.

    If this process is interrupted, the verb is stopped in the same way first. Raises VerbFailedError for any exit code but 0,
    and 75 (stopped on request).
    """
    command = [sys.executable, "-m", "tarflow", *map(str, words)]
    before, begun = children_s(), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        start = out.tell()
        env = {"OMP_NUM_THREADS": "1"} | os.environ
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = _stop(process)
        except BaseException:
            _stop(process)
            raise
    ran = Ran(code, children_s() - before, time.monotonic() - begun)
    if code not in (FINISHED, STOPPED):
        with log.open("rb") as file:
            file.seek(start)
            said = file.read().decode(errors="replace")
        raise VerbFailedError(f"{' '.join(command[2:])}: exit code {code} ({log})\n{said[-_SHOWN:]}")
    return ran


def _stop(process: "subprocess.Popen[bytes]") -> int:
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        code = process.wait(_PATIENCE_S)
        return STOPPED if code == -signal.SIGTERM else code  # the verb had not yet begun to listen
    process.kill()
    return process.wait()


def children_s() -> float:
    """CPU seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def stop_on_sigterm() -> None:
    """Make SIGTERM end this process as Ctrl-C does, so that a verb it waits for is stopped too."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"model.channels": 8}` -> `{"model": {"channels": 8}}`: the text of a configuration file, as a tree."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, field = name.partition(".")
        tree.setdefault(section, {})[field] = value
    return tree


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """The same as words of a command: `model.channels=8`."""
    return [f"{name}={_word(value)}" for name, value in settings.items()]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(_word(v) for v in value) + "]"
    return "null" if value is None else str(value)
