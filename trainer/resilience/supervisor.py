"""Start the ranks of a run on this machine, and start them again when one dies: the allocation is not lost with it.

Nothing here needs torch. The ranks' exit codes are passed on (torchrun would turn every one but 0 into 1).
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

GRACE_S = 20.0  # for the other ranks to notice that one is gone and to say what they saw
FINAL = (NO_PROGRESS, USAGE)  # starting again would end the same way


class Supervisor:
    """Runs one command as `ranks` processes until it is finished, stopped, or restarted too often."""

    def __init__(self, command: Sequence[str], ranks: int, run_dir: Path, max_restarts: int) -> None:
        self.command, self.ranks, self.run_dir, self.max_restarts = list(command), ranks, run_dir, max_restarts
        self._stop_asked = self._interrupted = False
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Returns the exit code of the run as a whole."""
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
        threads = str(max(1, (os.cpu_count() or 1) // self.ranks))
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
        if self._stop_asked:  # while they were started
            self._send(signal.SIGTERM)

    def _wait(self) -> tuple[int, str]:
        """(exit code, who ended first and how) once all ranks are gone."""
        first: tuple[int, int] | None = None
        deadline = float("inf")
        while any(p.poll() is None for p in self._processes):
            ended = [(r, p.returncode) for r, p in enumerate(self._processes) if p.poll() is not None]
            if ended and deadline == float("inf"):
                deadline = time.monotonic() + GRACE_S
            bad = [(r, code) for r, code in ended if code not in (FINISHED, REQUEUE)]
            first = first or (
                min(bad, key=lambda e: e[1]) if bad else None
            )  # a signal's code is negative: it is the cause
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
        """Hand a stop signal on.

        A SIGINT from a keyboard reaches the ranks by itself, and two would end them unsaved, so
        it goes on as a SIGTERM; a second one ends them, since that is what it means.
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
    """Prepare the new process, before it runs the rank.

    A rank whose supervisor is killed is asked to stop: nobody else would (Linux only). And stop signals wait until it
    listens to them, or a signal while it starts would be a plain kill.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def supervise(arguments: Sequence[str], ranks: int, run_dir: Path, max_restarts: int) -> int:
    """Run `tarflow train ARGUMENTS` as so many ranks on this machine."""
    return Supervisor(module_command("tarflow", "train", *arguments), ranks, run_dir, max_restarts).run()
