"""Whether a run is being trained at this moment, by the heartbeats of its ranks in `heartbeats/`.

Never takes the lock of the run, which would block a start. Needs no torch.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from tarflow.errors import noted
from tarflow.files import listed
from tarflow.records import DamagedFileError, Record, load_record
from tarflow.trainer.run_dir import Holder, Words

# A rank writes every two seconds; a network file system may show that late.
FRESH_S = 60.0
# The last phase of a rank: it ended normally, with an error, or because it hung. A rank that is killed writes none of them.
GONE, FAILED, HUNG = "gone", "failed", "hung"
ENDED = (GONE, FAILED, HUNG)
KILLED = "killed"


class Heartbeat(Record):
    """What a rank writes every two seconds."""

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

    A damaged one has only `seen`, and counts as alive for as long as that is fresh.
    """
    beats: list[dict[str, Any]] = []
    for path in listed(run_dir / "heartbeats", "rank-*.json"):
        try:
            seen = path.stat().st_mtime
            beats.append({**load_record(path, Heartbeat).model_dump(exclude_unset=True), "seen": seen})
        except DamagedFileError:
            beats.append({"seen": seen})
        except OSError:
            continue
    # A start on fewer ranks leaves the files of the others behind.
    size = next((beat["world_size"] for beat in beats if beat.get("world_size")), None)
    return beats[:size]


def damaged_heartbeats(run_dir: Path) -> list[str]:
    """What is wrong with the heartbeat files of a run, one text for each."""
    flaws: list[str] = []
    for path in listed(run_dir / "heartbeats", "rank-*.json"):
        with noted(flaws), suppress(FileNotFoundError):
            load_record(path, Heartbeat)
    return flaws


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


def living_writer(run_dir: Path, now: float | None = None) -> Holder | None:
    """The process that trains a run, by its heartbeats; of several ranks the first."""
    return next((holder_of(beat) for beat in read_heartbeats(run_dir) if is_alive(beat, now)), None)


def last_words(run_dir: Path) -> str | None:
    """How the last start ended: GONE, FAILED, HUNG, or KILLED if a rank wrote none of these; None before any start."""
    phases = [beat.get("phase") for beat in read_heartbeats(run_dir)]
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
