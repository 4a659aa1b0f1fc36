"""A heartbeat file per rank, and a timeout for ranks that hang.

A phase that takes too long means that this rank, or one that it waits for, hangs: the stacks of all threads go to the log of
the rank and the process exits with a code of its own, so that an allocation is not wasted in silence. Startup, saves and the
end may take `parallel.start_timeout_s`, a step `parallel.step_timeout_s`; `limits.py` derives all else.

A second thread writes `heartbeats/rank-0003.json` (phase, step, time in the phase), the ranks of a large run in turn. A shared
file system that does not answer stalls that thread alone: the one that watches opens no file until it ends the process.
"""

import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tarflow.files import make_folder, open_own, write_new
from tarflow.records import sealed
from tarflow.trainer.config.schema import ParallelConfig
from tarflow.trainer.outbox import within
from tarflow.trainer.resilience import alive
from tarflow.trainer.resilience.alive import read_heartbeats
from tarflow.trainer.resilience.exit_codes import HUNG
from tarflow.trainer.resilience.limits import LAST_WORDS_S, PhaseLimits, limits_of
from tarflow.trainer.run_dir import Holder, is_run, note, rank_log

QUICK = ("data", "step")  # phases within a step; all others may take long
STRAGGLER = 1.5  # times the median rank's own time per step, above which a rank is named
LOOK_S = 30.0  # between two comparisons of all ranks
READS_PER_S = 10.0  # heartbeats that these comparisons read: of a large run they come less often


class Watchdog:
    """Watches this rank while entered. The loop reports progress by `phase` and `step_done`."""

    def __init__(self, run_dir: Path, rank: int, world_size: int, limits: ParallelConfig) -> None:
        self.run_dir, self.rank, self.world_size, self.limits = run_dir, rank, world_size, limits
        self.name, self.step = "start", 0
        self._idle_s = 0.0  # since the last progress, without times when this process was suspended
        self._own: deque[float] = deque(maxlen=64)
        self._stop = threading.Event()
        self._limits = limits_of(limits)
        self._interval = self._limits.look_s
        self._schedule = alive.BeatSchedule(rank, world_size)
        self._named: int | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> "Watchdog":
        folder = make_folder(self.run_dir, "heartbeats")
        self._path = folder / f"rank-{self.rank:04d}.json"
        log = rank_log(self.run_dir, self.rank)
        make_folder(self.run_dir, *log.relative_to(self.run_dir).parts[:-1])
        self._file = open(open_own(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        self._beats = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
        self._beats.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.phase(alive.GONE if kind is None else alive.FAILED)
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._beats.join(LAST_WORDS_S)
        assert self._file is not None
        self._file.close()

    def phase(self, name: str) -> None:
        """Report that a phase begins."""
        self.name, self._idle_s = name, 0.0

    def step_done(self, step: int, own_s: Iterable[float] = ()) -> None:
        """Report that a step is done; `own_s`: seconds that this rank worked by itself in the steps of which it is known."""
        self.step, self._idle_s = step, 0.0
        self._own.extend(own_s)

    @property
    def _phase(self) -> PhaseLimits:
        return self._limits.step if self.name in QUICK else self._limits.start

    @property
    def limit_s(self) -> float:
        """Timeout of the current phase."""
        return self._phase.idle_s

    @property
    def _look_s(self) -> float:
        return min(max(LOOK_S, self.world_size / READS_PER_S), self.limits.step_timeout_s)

    def _watch(self) -> None:
        assert self._file is not None
        last = time.monotonic()
        while True:
            # For hangs in which this thread cannot run either: a C-level timer, which fires while the GIL is held. It exits
            # with code 1.
            faulthandler.dump_traceback_later(self._phase.clock_s, exit=True, file=self._file)
            if self._stop.wait(self._interval):
                return
            now = time.monotonic()
            # A suspended machine or job stops this thread too: such a gap is not a hang.
            self._idle_s += min(now - last, 2 * self._interval)
            last = now
            if self._idle_s > self.limit_s:
                self._end()

    def _beat(self) -> None:
        """Write heartbeats, the last one at the end; on rank 0, compare those of all ranks now and then."""
        looked = time.monotonic()
        while True:
            self.beat()
            if self._stop.wait(self._interval):
                break
            now = time.monotonic()
            if self.rank == 0 and self.world_size > 1 and now - looked > self._look_s:
                looked = now
                with suppress(OSError):
                    self._name_straggler()
        self._write()

    def _end(self) -> None:
        """Log where this rank hangs, and exit."""
        limit = "step" if self.name in QUICK else "start"
        text = (
            f"HUNG: rank {self.rank} (host {os.uname().nodename}) made no progress for {self._idle_s:.0f} s in phase "
            f"{self.name!r} of step {self.step + 1} (parallel.{limit}_timeout_s={self.limit_s:g}); it ends with exit code "
            f"{HUNG}, the stacks of its threads are in {rank_log(self.run_dir, self.rank)}"
        )

        def last_words() -> None:
            note(self.run_dir, text)
            assert self._file is not None
            self._file.write(f"\nstacks of rank {self.rank}, {text}\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)
            self.name = alive.HUNG
            self._write()

        try:
            within(self._phase.words_s, last_words)
        finally:  # also on a full disk, or one that does not answer
            os._exit(HUNG)

    def beat(self) -> None:
        """Write the heartbeat, if it is this rank's turn."""
        if self._schedule.due(time.monotonic()):
            self._write()

    def _write(self) -> None:
        facts: dict[str, Any] = {
            "rank": self.rank, "world_size": self.world_size, **vars(Holder.of_this_process()),
            "phase": self.name, "step": self.step,
            "still_s": round(self._idle_s, 1), "own_s": statistics.median(self._own) if self._own else None,
            "time": time.time(),
        }  # fmt: skip
        temporary = self._path.with_suffix(".tmp")
        try:
            write_new(temporary, json.dumps(sealed(facts)))
            os.replace(temporary, self._path)
        except OSError:  # a full disk must not end the thread
            temporary.unlink(missing_ok=True)

    def _name_straggler(self) -> None:
        found = straggler(read_heartbeats(self.run_dir)[: self.world_size])
        if found is not None and found[0] != self._named:
            rank, own, median = found
            note(
                self.run_dir,
                f"straggler: rank {rank} needs {own:.3f} s of its own per step, the median rank {median:.3f} s "
                f"({own / median:.1f} times); all ranks wait for it",
            )
        self._named = found[0] if found else None


@contextmanager
def deadline(seconds: float, run_dir: Path, rank: int, doing: str) -> Iterator[None]:
    """Exit this process, with its stacks on standard error, if the body takes too long.

    For waits before the watchdog runs. Joining the other ranks is one: torch retries after its own timeout, so that a rank
    whose peer died before it could listen would wait up to three times as long.
    """

    def end() -> None:
        text = (
            f"HUNG: rank {rank} (host {os.uname().nodename}) was still {doing} after {seconds:g} s "
            f"(parallel.start_timeout_s); it ends with exit code {HUNG}"
        )
        try:
            print(text, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            if is_run(run_dir):
                note(run_dir, text)
        finally:
            os._exit(HUNG)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def straggler(beats: list[dict[str, Any]]) -> tuple[int, float, float] | None:
    """(rank, its own seconds per step, the median) if the heartbeats show a rank far slower than the median."""
    times = {beat["rank"]: beat["own_s"] for beat in beats if beat.get("own_s") and "rank" in beat}
    if len(times) < 2:
        return None
    rank = max(times, key=lambda r: times[r])
    # The lower median: of two ranks, the slower one is compared with the faster one.
    median = statistics.median_low(list(times.values()))
    return (rank, times[rank], median) if times[rank] > STRAGGLER * median else None
