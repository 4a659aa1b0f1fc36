"""Detects another process that trains the same run: the job leaves the run to it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tarflow.cluster.errors import ClusterError, RunInUseError
from tarflow.leases import locked
from tarflow.trainer.resilience.alive import beat_interval_s, holder_of, is_alive, read_heartbeats
from tarflow.trainer.run_dir import LOCK, Holder, read_holder

WATCH_S = 5.0  # a living process beats within this time, or that of one and a quarter of its heartbeats
READS_PER_S = 200.0  # heartbeats read while waiting: those of a large run are looked at less often
PATIENCE_S = 120.0  # processes of a lost node live on for a while


def wait_for_writer(
    run_dir: Path, job: str, log: Callable[[str], None], stopped: Callable[[], bool] = lambda: False,
    patience_s: float = PATIENCE_S,
) -> None:  # fmt: skip
    """Return once only this job can be writing the run.

    Slurm may restart a job while the processes of a lost node live on: an earlier start of this job is waited for, since it
    must end soon. Any other live process raises `RunInUseError` at once.
    """
    begin, told = time.monotonic(), False
    pulse = _Pulse(run_dir, job)
    while not stopped():
        held, waited = is_locked(run_dir), time.monotonic() - begin
        holder = read_holder(run_dir) if held else pulse.suspect
        if not held and (holder is None or (waited > pulse.watch_s and not pulse.beats())):
            return
        earlier_start = holder is not None and holder.job == job
        if not earlier_start and pulse.beats():
            raise RunInUseError(run_dir, holder)
        if waited > patience_s:
            if not earlier_start:
                raise RunInUseError(run_dir, holder)
            raise ClusterError(f"run {run_dir} is still in use by an earlier start after {patience_s:.0f} s ({holder})")
        if not told:
            log(f"waiting for the process that still holds the run ({holder or 'unnamed'})")
            told = True
        time.sleep(max(0.5, pulse.ranks / READS_PER_S))


def other_writer(run_dir: Path, job: str) -> Holder | None:
    """The process that holds the run now, if it is not of a start of this job."""
    holder = read_holder(run_dir) if is_locked(run_dir) else None
    return holder if holder is not None and holder.job != job and _others(run_dir, job) else None


def is_locked(run_dir: Path) -> bool:
    """Whether a process holds the run's lock."""
    with locked(run_dir / LOCK, lasting=True) as free:
        return not free


def _others(run_dir: Path, job: str) -> dict[int, dict[str, Any]]:
    """Heartbeats of ranks that may be alive and are not of a start of this job, by rank."""
    found = enumerate(read_heartbeats(run_dir))
    return {rank: beat for rank, beat in found if is_alive(beat) and holder_of(beat).job != job}


class _Pulse:
    """Tells a live process from the last heartbeats of a dead one."""

    def __init__(self, run_dir: Path, job: str) -> None:
        self.run_dir, self.job = run_dir, job
        self._first = _others(run_dir, job)
        self.ranks = len(self._first)
        size = max((beat.get("world_size") or 1 for beat in self._first.values()), default=1)
        self.watch_s = max(WATCH_S, 1.25 * beat_interval_s(size))
        self.suspect = next((holder_of(beat) for beat in self._first.values()), None)

    def beats(self) -> bool:
        """Whether a rank of another process has sent a heartbeat since the first look."""
        now = _others(self.run_dir, self.job)
        return any(beat.get("time") != self._first.get(rank, {}).get("time") for rank, beat in now.items())
