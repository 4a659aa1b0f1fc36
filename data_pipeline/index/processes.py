"""Run many jobs in fresh processes: results in order, a bounded number ahead, nothing outlives the caller.

The processes are plain interpreters (`python -m tarflow.data_pipeline.index.processes`) that get pickled jobs through a
pipe and end when it closes. Unlike forked ones they inherit no locks or threads, and they do not import the caller's main
program. Unpickling runs code; these pickles come through an anonymous pipe from a process of our own.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from tarflow.data_pipeline.errors import DataError
from tarflow.interpreter import child_environment, deaf_to_terminals, module_command

_AHEAD = 3  # results per process that may wait for their turn

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_processes(work: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> Generator[Result, None, None]:
    """`work(job)` for every job, in order; in this process where one is enough.

    `work` is a module's function, and jobs and results can be pickled. Errors are raised when their job's turn comes.
    """
    if processes <= 1 or len(jobs) <= 1:
        yield from map(work, jobs)
        return
    own = threading.local()
    started: list[subprocess.Popen[bytes]] = []
    starting, over = threading.Lock(), threading.Event()

    def ask(job: Job) -> Any:
        if not hasattr(own, "process"):
            with starting:  # so that the cleanup below sees every process
                if over.is_set():
                    return None
                own.process = _start()
                started.append(own.process)
        return _ask(own.process, work, job)

    pool = ThreadPoolExecutor(min(processes, len(jobs)), thread_name_prefix="tarflow-jobs")
    try:
        waiting: deque[Future[Any]] = deque()
        for job in jobs:
            waiting.append(pool.submit(ask, job))
            if len(waiting) > _AHEAD * processes:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        over.set()
        pool.shutdown(wait=False, cancel_futures=True)
        with starting:
            for process in started:
                process.kill()
                process.wait()
        pool.shutdown(wait=True)


def _result(future: Future[Any]) -> Any:
    """A future's result. Waits in slices: a signal that arrives just before a wait is only handled after it."""
    while True:
        try:
            return future.result(timeout=1.0)
        except TimeoutError:
            if future.done():
                raise  # it is the job's own error


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start() -> subprocess.Popen[bytes]:
    with deaf_to_terminals():
        return subprocess.Popen(  # noqa: S603 -- this package, by its own interpreter
            module_command("tarflow.data_pipeline.index.processes"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=child_environment(OMP_NUM_THREADS="1"),
        )  # fmt: skip


def _ask(process: subprocess.Popen[bytes], work: Callable[[Any], Any], job: Any) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pickle.dump((work, job), process.stdin)
        process.stdin.flush()
        good, value = pickle.load(process.stdout)  # noqa: S301 -- from the process that was started above
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        raise DataError(f"a process that worked on {job!r:.300} ended with exit code {process.wait()}") from None
    if not good:
        raise value
    return value


def _serve() -> None:
    """Run jobs until the pipe closes. What they print goes to stderr: stdout carries the results."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            work, job = pickle.load(sys.stdin.buffer)  # noqa: S301 -- from the process that started this one
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, work(job)))
        except DataError as err:
            answer = pickle.dumps((False, DataError(str(err))))
        except Exception as err:  # noqa: BLE001 -- whatever it is goes back to the caller, which raises it
            answer = pickle.dumps((False, RuntimeError(f"{type(err).__name__} while working on {job!r:.300}: {err}")))
        answers.write(answer)
        answers.flush()


if __name__ == "__main__":
    _serve()
