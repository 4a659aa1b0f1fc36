"""Starts the ranks of a run on this machine, and restarts them when one dies, so that the allocation is not lost.

Needs no torch. Passes the exit codes of the ranks on (torchrun turns every one but 0 into 1).
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tarflow.interpreter import child_environment, module_command
from tarflow.trainer.resilience.exit_codes import FAILED, FINISHED, HUNG, NO_PROGRESS, REQUEUE, USAGE
from tarflow.trainer.resilience.signals import STOP_SIGNALS, catch
from tarflow.trainer.run_dir import is_run, note

GRACE_S = 20.0  # for the other ranks to notice that one is gone, and to log what they saw
FINAL = (NO_PROGRESS, USAGE)  # a restart would end the same way


class Supervisor:
    """Runs a command as `ranks` processes until it finishes, is stopped, or has been restarted too often."""

    def __init__(
        self, command: Sequence[str], ranks: int, run_dir: Path, max_restarts: int, grace_s: float = GRACE_S
    ) -> None:
        self.command, self.ranks, self.run_dir, self.max_restarts = list(command), ranks, run_dir, max_restarts
        self.grace_s = grace_s
        self._stop_asked = self._interrupted = False
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Run to the end; returns the exit code of the run as a whole."""
        before = catch(self._forward)
        code = FAILED
        try:
            for restart in range(self.max_restarts + 1):
                self._start()
                code, cause = self._wait()
                if code in (FINISHED, REQUEUE, *FINAL) or self._stop_asked:
                    return code
                again = restart < self.max_restarts
                self._log(
                    f"{cause}; all ranks are gone; "
                    + (
                        f"restart {restart + 1} of {self.max_restarts}"
                        if again
                        else "no restarts are left (--max-restarts)"
                    )
                )
            return code
        finally:
            self._end_all()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # Those that this process may use: a container or a job may have given it some of the machine's.
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.ranks))
        common = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self._processes = [
            subprocess.Popen(  # noqa: S603 -- this package, by its own interpreter
                self.command,
                env={
                    "OMP_NUM_THREADS": threads,
                    **child_environment(),
                    **common,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                },
                preexec_fn=_before_the_rank,
            )
            for rank in range(self.ranks)
        ]
        if self._stop_asked:  # a signal came while they were being started
            self._send(signal.SIGTERM)

    def _wait(self) -> tuple[int, str]:
        """Wait for all ranks; returns (exit code, text on which rank failed first and how)."""
        first: tuple[int, int] | None = None
        deadline = float("inf")
        while any(p.poll() is None for p in self._processes):
            ended = [(r, p.returncode) for r, p in enumerate(self._processes) if p.poll() is not None]
            if ended and deadline == float("inf"):
                deadline = time.monotonic() + self.grace_s
            bad = [(r, code) for r, code in ended if code not in (FINISHED, REQUEUE)]
            # Of several at once, one killed by a signal (a negative code) is the cause.
            first = first or (min(bad, key=lambda e: e[1]) if bad else None)
            if time.monotonic() > deadline:
                self._end_all()
            time.sleep(0.02)
        codes = [p.returncode for p in self._processes]
        if first is None:
            first = next(((r, code) for r, code in enumerate(codes) if code not in (FINISHED, REQUEUE)), None)
        if first is None:
            return max(codes), ""
        known = [code for code in (*FINAL, HUNG) if code in codes]
        return (known[0] if known else FAILED), f"rank {first[0]} {_how(first[1])} first"

    def _forward(self, number: int, _: object) -> None:
        """Forward a stop signal to the ranks.

        A SIGINT from the keyboard reaches the ranks anyway, and two of them would end a rank unsaved, so it is forwarded as
        a SIGTERM. A second one kills the ranks: that is what it asks for.
        """
        interrupts = number == signal.SIGINT
        if interrupts and self._interrupted:
            for process in self._processes:
                process.kill()
        self._stop_asked, self._interrupted = True, self._interrupted or interrupts
        self._send(signal.SIGTERM if interrupts else number)

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.send_signal(number)

    def _end_all(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()

    def _log(self, text: str) -> None:
        print(f"supervisor: {text}", file=sys.stderr, flush=True)
        if is_run(self.run_dir):
            with suppress(OSError):  # a full disk must not end the supervision
                note(self.run_dir, text)


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}" + (
        " (often: out of memory)" if code == -signal.SIGKILL else ""
    )


def _before_the_rank() -> None:
    """Runs in the child before the rank's program.

    Stop signals are blocked until the rank has installed its handlers, or one that comes while it starts would kill it. If
    the supervisor dies, the kernel sends the rank a SIGTERM (Linux only): nobody else would stop it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def supervise(arguments: Sequence[str], ranks: int, run_dir: Path, max_restarts: int) -> int:
    """Run `tarflow train ARGUMENTS` as `ranks` processes on this machine. Returns the exit code."""
    return Supervisor(module_command("tarflow", "train", *arguments), ranks, run_dir, max_restarts).run()
