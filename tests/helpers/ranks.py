"""Ranks for tests: forks of an interpreter that has loaded torch and the trainer, so that a start costs milliseconds."""

import contextlib
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

spawner = multiprocessing.get_context("forkserver")
spawner.set_forkserver_preload(["tests.helpers.prepared"])


def begin(process: ForkServerProcess) -> None:
    """Start one, as a fork of the server: that finds what it loads from here, whatever the test's own folder."""
    with contextlib.chdir(ROOT):
        process.start()


@dataclass(frozen=True)
class Ended:
    """How the ranks of a launch ended, in the order of their numbers."""

    codes: list[int]  # negative: killed by that signal
    values: list[Any]  # what the function returned, None where it did not
    stdout: str  # of all
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def launch_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, may_fail: bool = False, patience_s: float = 600
) -> Ended:
    """Call `fn(*args)` in `world_size` processes under the variables that torchrun sets, and wait for their end.

    `fn` is a function of a module (it goes by its name), and its asserts count: unless the ranks may fail, one that
    raises, exits or is killed fails the test, with what all have printed. A single rank gets no variables, like a program
    without a launcher. For whatever is about a launcher itself, start that one.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder, port, here = Path(name), free_port(), os.getcwd()
        processes = []
        for rank in range(world_size):
            variables = torchrun_variables(rank, world_size, port) if world_size > 1 else {}
            order = (pickle.dumps((fn, args)), os.environ | variables, here, folder, rank)
            processes.append(spawner.Process(target=_rank, args=order))
        for process in processes:
            begin(process)
        end = time.monotonic() + patience_s
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in late:
            processes[rank].kill()
        codes = []
        for process in processes:
            process.join()
            assert process.exitcode is not None
            codes.append(process.exitcode)
        files = [folder / f"{rank}.value" for rank in range(world_size)]
        values = [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
        printed = [folder / name for name in ("stdout", "stderr")]
        stdout, stderr = (file.read_text(errors="backslashreplace") if file.exists() else "" for file in printed)
    ended = Ended(codes, values, stdout, stderr)
    assert not late, f"ranks {late} have not ended after {patience_s} s\n{ended.output[-6000:]}"
    assert may_fail or not any(codes), f"exit codes {codes}\n{ended.output[-6000:]}"
    return ended


def tarflow(*words: object) -> subprocess.CompletedProcess[str]:
    """`tarflow WORDS` in a process of its own, which has loaded torch already."""
    line = [str(word) for word in words]
    ended = launch_ranks(_front_door, 1, line, may_fail=True)
    return subprocess.CompletedProcess(line, ended.codes[0], ended.stdout, ended.stderr)


def _front_door(words: list[str]) -> None:
    from tarflow.cli import main

    sys.exit(main(words))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def torchrun_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Of ranks on one node."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _rank(call: bytes, environment: Mapping[str, str], at: str, folder: Path, rank: int) -> None:
    """One rank, from its fork to its end."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, flags), descriptor)
    assert "tarflow.trainer.train" in sys.modules, "the fork server has loaded nothing: run pytest from the repository"
    os.chdir(at)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["torch"].set_num_threads(1)
    code = 1
    try:
        fn, args = pickle.loads(call)
        value = fn(*args)
        (folder / f"{rank}.value").write_bytes(pickle.dumps(value))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - whatever it is, the test hears of it
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
