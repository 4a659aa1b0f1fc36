"""One evaluation worker per device of this machine: processes of one command, which share the chunks of each result.

A worker that is killed costs at most a chunk, which the others compute again; so the others go on, and one line says so.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log
from tarflow.interpreter import child_environment, module_command

VISIBLE = "CUDA_VISIBLE_DEVICES"
OK, FAILED = 0, 1
_PATIENCE_S = 10.0  # for a worker to end after a signal, before it is killed


@dataclass(frozen=True)
class Devices:
    """What this machine offers: the devices that torch sees, and the names under which a process may be given one."""

    count: int  # 0: no accelerator of which there can be several
    names: tuple[str, ...]  # entries of CUDA_VISIBLE_DEVICES

    @classmethod
    def found(cls, device: str) -> "Devices":
        """Those for `--device DEVICE`. Creates no context on any of them."""
        named = tuple(name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip())
        if device in ("cpu", "mps"):
            return cls(0, ())
        import torch

        count = torch.cuda.device_count()
        return cls(count, named or tuple(str(index) for index in range(count)))

    def workers(self, asked: str) -> int:
        """How many workers `--workers ASKED` means: auto is one for each device, and one on a CPU.

        Raises EvaluationError for more than there are devices: two on one would fail for lack of memory.
        """
        if asked == "auto":
            return max(self.count, 1)
        if not (asked.isascii() and asked.isdigit() and 0 < int(asked) <= 1024):
            raise EvaluationError(f"--workers {asked}: give a number from 1 to 1024, or auto for one on each device")
        if self.count and int(asked) > self.count:
            raise EvaluationError(
                f"--workers {asked}, but {self.count} of this machine's devices are visible "
                f"({VISIBLE}={os.environ.get(VISIBLE, 'not set')}): use --workers auto, or make more of them visible"
            )
        return int(asked)

    def environment(self, worker: int) -> dict[str, str]:
        """The variables that give a worker its own device."""
        return {VISIBLE: self.names[worker]} if worker < len(self.names) else {}


def words_again(args: argparse.Namespace, without: Sequence[str]) -> list[str]:
    """The options and overrides of a parsed command line, in a form that parses to the same, but for some options."""
    words = [str(args.run), *args.overrides]
    for action in args.parser._actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings or action.dest in without or value in (None, action.default):
            continue
        words += [action.option_strings[0]] if action.nargs == 0 else [action.option_strings[0], str(value)]
    return words


def run_workers(words: Sequence[str], count: int, devices: Devices, threads: int | None, log: Log) -> int:
    """Run `tarflow evaluate WORDS` as `count` processes until all have ended; the exit code of them together.

    `threads`: of each; None goes by OMP_NUM_THREADS, and shares the processors out where that is not set.
    """
    words = list(words)
    if threads or "OMP_NUM_THREADS" not in os.environ:
        words += ["--threads", str(threads or max(1, len(os.sched_getaffinity(0)) // count))]
    command = module_command("tarflow", "evaluate", *words, unbuffered=True)
    what = ", ".join(devices.names[:count]) if devices.names else "the CPU"
    log(f"{count} workers on {what}")
    with _stopped_by_signals():
        workers: list[_Worker] = []
        try:
            for number in range(count):  # one by one: should the second not start, the first is ended
                workers.append(_Worker(number, command, devices.environment(number)))  # noqa: PERF401
            for worker in workers:  # threads only now: a process that has some should not be forked
                worker.listen()
            return _wait(workers, log)
        finally:
            for worker in workers:
                worker.ask_to_end()
            deadline = time.monotonic() + _PATIENCE_S
            for worker in workers:
                worker.end(deadline)


def _wait(workers: Sequence["_Worker"], log: Log) -> int:
    running = list(workers)
    while running:
        for worker in [one for one in running if one.process.poll() is not None]:
            running.remove(worker)
            worker.finish_output()
            if (code := worker.process.returncode) < 0:
                rest = "the others take over its work" if running else "start the command again for what is missing"
                log(f"worker {worker.number} was killed by {_signal_name(-code)}: {rest}")
            elif code:
                log(f"worker {worker.number} ended with exit code {code}")
        time.sleep(0.05)
    ended = [worker.process.returncode for worker in workers if worker.process.returncode >= 0]
    return max(ended) if ended else FAILED


class _Worker:
    """One process, whose lines are passed on under its number."""

    def __init__(self, number: int, command: Sequence[str], environment: dict[str, str]) -> None:
        self.number = number
        self.process = subprocess.Popen(  # noqa: S603 -- this package, by its own interpreter
            command, env=child_environment(**environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", preexec_fn=_end_with_parent,
        )  # fmt: skip
        self._readers: list[threading.Thread] = []

    def listen(self) -> None:
        """Begin to pass its output on."""
        pipes = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self._readers = [threading.Thread(target=self._pass_on, args=pipe, daemon=True) for pipe in pipes]
        for reader in self._readers:
            reader.start()

    def _pass_on(self, lines: IO[str], out: IO[str]) -> None:
        for line in lines:
            with suppress(OSError, ValueError):  # nobody reads it any more; the worker goes on
                out.write(f"worker {self.number}: {line}")
                out.flush()

    def finish_output(self) -> None:
        """Pass on what the process has printed before it ended."""
        for reader in self._readers:
            reader.join(5)

    def ask_to_end(self) -> None:
        """Send it a SIGTERM, if it still runs."""
        if self.process.poll() is None:
            self.process.terminate()

    def end(self, deadline: float) -> None:
        """Wait until the deadline, then kill it."""
        try:
            self.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.finish_output()


def _end_with_parent() -> None:
    """Runs in a new process: if the one that started it is killed, the kernel sends it a SIGTERM (Linux only)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Unwind at the signals with which Slurm asks a job to stop, so that no worker is left; their default is to end at once."""

    def stop(number: int, _: Any) -> NoReturn:
        raise SystemExit(128 + number)

    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
