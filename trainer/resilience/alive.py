"""Whether a run is being trained at this moment, by the heartbeats of its ranks in `heartbeats/`.

Never takes the lock of the run, which would block a start. Needs no torch.
"""

import os
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from tarflow.files import listed
from tarflow.records import DamagedFileError, Record, load_record
from tarflow.trainer.run_dir import Holder, Words

BEAT_S = 2.0  # between two heartbeats of a rank, unless the run is so large that its ranks take turns
BEATS_PER_S = 50.0  # of all ranks together: each is a file made and renamed, on a file server that others use too
FRESH_S = (
    60.0  # a heartbeat is at most a third as old when the next one comes; a network file system may show that late
)
# The last phase of a rank: it ended normally, with an error, or because it hung. A rank that is killed writes none of them.
GONE, FAILED, HUNG = "gone", "failed", "hung"
ENDED = (GONE, FAILED, HUNG)
KILLED = "killed"


def beat_interval_s(world_size: int) -> float:
    """Seconds between two heartbeats of a rank: 2, from 100 ranks on more, at most 20."""
    return min(max(BEAT_S, world_size / BEATS_PER_S), FRESH_S / 3)


class BeatSchedule:
    """When a rank writes its heartbeat: whenever it looks at the schedule, or in a large run in its turn."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._interval_s = beat_interval_s(world_size)
        # Ranks begin together, and would write together ever after. By the golden ratio any number of them is spread evenly.
        self._offset_s = self._interval_s * (rank * 0.6180339887 % 1)
        self._next = float("-inf")

    def due(self, now: float) -> bool:
        """Whether to write now (a monotonic time in seconds): at the start, and then in turn."""
        if self._interval_s <= BEAT_S:
            return True
        if now < self._next:
            return False
        started = self._next > float("-inf")
        self._next = max(self._next + self._interval_s, now) if started else now + self._offset_s
        return True


class Heartbeat(Record):
    """What a rank writes every `beat_interval_s` seconds."""

    what = "heartbeat of a rank"
    rank: int = Field(0, ge=0, le=10**6)
    world_size: int | None = Field(None, ge=1, le=10**6)
    host: Words = "?"
    pid: int = Field(0, ge=0, lt=1 << 32)
    job: Words = ""
    phase: Words = ""
    step: int = Field(0, ge=0, le=10**15)
    still_s: float = Field(0, ge=0)  # seconds without progress
    own_s: float | None = Field(None, ge=0)  # seconds per step not spent waiting for other ranks
    time: float | None = None


def read_heartbeats(run_dir: Path) -> list[dict[str, Any]]:
    """The last heartbeat of every rank of the newest start, by rank; `seen`: when, by the file server's clock.

    A damaged one has only `seen` and `flaw`, and counts as alive for as long as that is fresh. One pass over the files of all
    ranks: readers that need several answers hand the list on.
    """
    beats: list[dict[str, Any]] = []
    for path in listed(run_dir / "heartbeats", "rank-*.json"):
        try:
            seen = 0.0 if path.is_symlink() and not path.exists() else path.stat().st_mtime
            beats.append({**load_record(path, Heartbeat).model_dump(exclude_unset=True), "seen": seen})
        except DamagedFileError as error:
            beats.append({"seen": seen, "flaw": str(error)})
        except OSError:
            continue
    # A start on fewer ranks leaves the files of the others behind.
    size = next((beat["world_size"] for beat in beats if beat.get("world_size")), None)
    return beats[:size]


def damaged_heartbeats(run_dir: Path) -> list[str]:
    """What is wrong with the heartbeat files of a run, one text for each."""
    return [beat["flaw"] for beat in read_heartbeats(run_dir) if "flaw" in beat]


def holder_of(beat: dict[str, Any]) -> Holder:
    """The process that wrote a heartbeat."""
    return Holder(str(beat.get("host", "?")), int(beat.get("pid", 0)), str(beat.get("job") or ""))


def is_alive(beat: dict[str, Any], now: float | None = None) -> bool:
    """Whether the rank is alive: by its process if that is on this machine, otherwise by the age of its heartbeat."""
    if beat.get("phase") in ENDED:
        return False
    if beat.get("host") == os.uname().nodename and Path("/proc/self").exists():
        return _runs_since(int(beat.get("pid", 0)), beat["seen"])
    return (time.time() if now is None else now) - beat["seen"] < FRESH_S


def living_writer(run_dir: Path, now: float | None = None, beats: list[dict[str, Any]] | None = None) -> Holder | None:
    """The process that trains a run, by its heartbeats; of several ranks the first. `beats`: as read before."""
    beats = read_heartbeats(run_dir) if beats is None else beats
    return next((holder_of(beat) for beat in beats if is_alive(beat, now)), None)


def last_words(run_dir: Path, beats: list[dict[str, Any]] | None = None) -> str | None:
    """How the last start ended: GONE, FAILED, HUNG, or KILLED if a rank wrote none of these; None before any start.

    `beats`: as read before.
    """
    phases = [beat.get("phase") for beat in (read_heartbeats(run_dir) if beats is None else beats)]
    if not phases:
        return None
    worst = next((phase for phase in (HUNG, FAILED) if phase in phases), None)
    return worst or (GONE if all(phase == GONE for phase in phases) else KILLED)


def _runs_since(pid: int, moment: float) -> bool:
    """Whether the process `pid` of this machine runs and started before `moment`: pids are reused."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    except (OSError, StopIteration):
        return False
    state, ticks = after_name[0], int(after_name[19])
    began = int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    return state not in "ZX" and began <= moment + 2.0
