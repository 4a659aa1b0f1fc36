"""Runs a command as a child: passes signals on, keeps the tail of its stderr, classifies its exit."""

import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from tarflow.cluster.exit_codes import FINISHED, NO_PROGRESS, REQUEUE

PATIENCE_S = 20.0  # between the first process's failure and the end of the others
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """While entered, stop signals set a flag and go on to the child; afterwards they are ignored.

    The handler does nothing else: it may interrupt any bytecode, also one that holds a lock.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.child: Children | None = None

    def __enter__(self) -> "Signals":
        for number in PASSED_ON:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        # The task is about to leave. A signal now is too late to mean anything, and must not make it a bad exit, for
        # which srun would kill the first task in the middle of its save or its requeue.
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_IGN)

    def stopped(self) -> bool:
        """Whether this task was asked to stop."""
        return self.received is not None

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if self.child is not None:
            # Training takes a second SIGINT as "leave without saving": the terminal or srun may have sent the first.
            self.child.send(signal.SIGTERM if number == signal.SIGINT else signal.Signals(number))


@dataclass(frozen=True)
class Exit:
    """How the processes of a task ended."""

    code: int  # negative: the signal that killed it
    index: int  # of the process whose exit counts
    last_line: str  # of its stderr


class Child:
    """A running command. Its stderr is copied to ours, and its last lines are kept."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(  # noqa: S603 -- this package, or srun with it
            command, env=env, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._lines: deque[str] = deque(maxlen=20)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            if line.strip():
                self._lines.append(line.rstrip())

    def send(self, number: signal.Signals) -> None:
        """Signal the command, if it still runs."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int | None:
        """The exit code (negative: the signal that killed it), or None if it still runs."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(5)
        return code

    def kill(self) -> None:
        """End it at once."""
        if self._process.poll() is None:
            self._process.kill()
        self.wait(10)

    @property
    def last_line(self) -> str:
        """The last line of its stderr that is not a frame of a traceback."""
        return next((line for line in reversed(self._lines) if not line.startswith((" ", "Traceback"))), "")


class Children:
    """The processes of one task: one for each environment. When one fails, the others have some time to notice."""

    def __init__(self, command: Sequence[str], envs: Sequence[Mapping[str, str]]) -> None:
        self._all = [Child(command, env) for env in envs]
        self._bad: tuple[int, int] | None = None  # (index, code) of the first failure
        self._deadline = float("inf")

    def send(self, number: signal.Signals) -> None:
        """Signal all."""
        for child in self._all:
            child.send(number)

    def wait(self, timeout_s: float) -> Exit | None:
        """The exit that counts, once all have exited; None if some still run."""
        end = time.monotonic() + timeout_s
        while True:
            codes = [child.wait(0) for child in self._all]
            bad = [(i, c) for i, c in enumerate(codes) if c not in (None, FINISHED, REQUEUE)]
            if bad and self._bad is None:
                # Of several that failed between two polls, a killed process (negative code) is the cause of the others.
                self._bad = min(bad, key=lambda one: one[1] or 0)
                self._deadline = time.monotonic() + PATIENCE_S
            if None not in codes:
                return self._verdict([c for c in codes if c is not None])
            if time.monotonic() > self._deadline:
                self._kill()
            elif time.monotonic() >= end:
                return None
            else:
                time.sleep(0.05)

    def _verdict(self, codes: list[int]) -> Exit:
        index, code = self._bad or max(enumerate(codes), key=lambda one: one[1])
        if NO_PROGRESS in codes:
            index, code = codes.index(NO_PROGRESS), NO_PROGRESS
        return Exit(code, index, self._all[index].last_line)

    def end(self, patience_s: float) -> None:
        """Ask them to stop, and kill those that do not within the patience."""
        self.send(signal.SIGTERM)
        self.end_within(patience_s)

    def end_within(self, patience_s: float) -> None:
        """Let them end by themselves, and kill those that do not within the patience."""
        if self.wait(patience_s) is None:
            self._kill()

    def _kill(self) -> None:
        for child in self._all:
            child.kill()
