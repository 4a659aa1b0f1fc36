"""The chain of starts of one job, and the rule by which it goes on or ends.

RUN/slurm/chain-JOB.json, a `ChainFile`. Only rank 0 writes it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from tarflow.cluster.exit_codes import FINISHED, IN_USE, NO_PROGRESS, REQUEUE, REQUEUE_LIMIT
from tarflow.records import DamagedFileError, Record, load_record, save_record

JOB_ID = r"^\d{1,12}(_\d{1,9})?$"


@dataclass(frozen=True)
class Limits:
    """When a chain stops by itself."""

    max_restarts: int = 100
    max_no_progress: int = 3


@dataclass(frozen=True)
class AttemptResult:
    """How the work of one start ended: its exit code, and the line for the log."""

    code: int
    text: str = ""
    node: str = ""  # the node at fault, if one is
    stopped: bool = False  # asked to stop by a signal


@dataclass(frozen=True)
class Decision:
    """What follows a start: requeue or not, the job's exit code, and the last line of its log."""

    requeue: bool
    code: int
    text: str
    cancelled: bool = False


class Start(Record):
    """One start of a job by Slurm."""

    restart: int = Field(ge=0, le=10**9)
    step: int = Field(ge=0, le=10**15)  # of the newest committed checkpoint
    nodes: str = ""
    time: float = Field(0.0, ge=0)


class End(Record):
    """How a chain ended."""

    code: int = Field(ge=0, le=255)
    text: str
    time: float = Field(0.0, ge=0)
    cancelled: bool = False


class ChainFile(Record):
    """The file of a chain."""

    what: ClassVar[str] = "record of the starts of a Slurm job"
    way_out: ClassVar[str] = "the run's checkpoints are not touched: move the file away and submit the run again"

    job: str | None = Field(None, pattern=JOB_ID)
    submission: str | None = None  # see Job
    starts: list[Start] = Field([])
    bad_nodes: dict[str, str] = Field({})
    ended: End | None = None


def foreign(path: Path, problem: str, where: str) -> DamagedFileError:
    """The error for a readable file that belongs to another job."""
    return DamagedFileError(path, problem, ChainFile.way_out, where=where, what=ChainFile.what)


@dataclass
class Chain:
    """The record of a chain."""

    path: Path
    starts: list[dict[str, Any]] = field(default_factory=list)
    bad_nodes: dict[str, str] = field(default_factory=dict)
    ended: dict[str, Any] | None = None
    job: str | None = None
    submission: str | None = None
    problem: str = ""  # why the file could not be read; only of `shown`

    @classmethod
    def load(cls, slurm_dir: Path, job: str) -> "Chain":
        """The chain of a job, for decisions; an empty one before its first start.

        Raises:
            DamagedFileError: its file is damaged, or is another job's.

        """
        path = slurm_dir / f"chain-{job}.json"
        try:
            found = load_record(path, ChainFile)
        except FileNotFoundError:
            return cls(path, job=job)
        if found.job not in (None, job):
            raise foreign(path, f"it is the record of job {found.job}", "job")
        return cls(path, **found.model_dump() | {"job": job})

    @classmethod
    def shown(cls, slurm_dir: Path, job: str) -> "Chain":
        """The same for display: a damaged file gives an empty chain, with `problem` set to the reason."""
        try:
            return cls.load(slurm_dir, job)
        except (DamagedFileError, OSError) as error:
            return cls(slurm_dir / f"chain-{job}.json", job=job, problem=str(error))

    def save(self) -> None:
        """Write the chain to its file."""
        starts = [Start(**start) for start in self.starts]
        ended = End(**self.ended) if self.ended else None
        record = ChainFile(
            job=self.job, submission=self.submission, starts=starts, bad_nodes=self.bad_nodes, ended=ended
        )
        save_record(self.path, record, shared=False)

    def begin(self, restart: int, step: int, nodes: str) -> None:
        """Record a start. Slurm restarts jobs by itself too (a failed node, `scontrol requeue`): all count."""
        self.starts.append({"restart": restart, "step": step, "nodes": nodes, "time": time.time()})
        self.ended = None
        self.save()

    def end(self, code: int, text: str, cancelled: bool = False) -> None:
        """Record that nothing follows."""
        self.ended = {"code": code, "text": text, "time": time.time(), "cancelled": cancelled}
        self.save()

    @property
    def failed(self) -> bool:
        """Whether the chain ended before its work was done."""
        return self.ended is not None and (self.ended["code"] != FINISHED or bool(self.ended.get("cancelled")))

    @property
    def restarts(self) -> int:
        """Restarts so far, as Slurm counts them."""
        return int(self.starts[-1]["restart"]) if self.starts else 0


def fruitless(starts: Sequence[Mapping[str, Any]], step: int) -> int:
    """Latest restarts in a row that began at `step`: neither they nor the start before them saved anything."""
    count = 0
    for start in reversed(starts):
        if start["step"] != step:
            break
        count += 1
    return max(count - 1, 0)


def decide(result: AttemptResult, chain: Chain, step: int, limits: Limits, cancelled: bool = False) -> Decision:
    """Whether a job starts again after a start that ended with `result`.

    Any failure may be the fault of a node or the file system, and is tried again while there is progress. A chain ends
    when it finishes, is cancelled, makes no progress, reaches the limit of restarts, or finds the run in use.
    """
    restarts = chain.restarts
    times = f"{restarts} restart{'s' if restarts != 1 else ''}"
    why = result.text or ("stopped on request" if result.stopped else f"exit code {result.code}")
    # The order is that of certainty: what the start itself reports, then what the user asked for, then the limits.
    if result.code == IN_USE:
        return Decision(False, IN_USE, f"stopped: {why}")
    if result.code == FINISHED:
        return Decision(False, FINISHED, f"finished at step {step} after {times}")
    if cancelled:
        return Decision(
            False,
            FINISHED,
            f"cancelled at step {step} after {times}; the same submission goes on from there",
            cancelled=True,
        )
    if result.code == NO_PROGRESS:
        return Decision(False, NO_PROGRESS, f"stopped: no progress at step {step} after {times}: {why}")
    # Ahead of the number of restarts, which may be large: a job that saves nothing would otherwise use it all up.
    wasted = fruitless(chain.starts, step)
    if wasted >= limits.max_no_progress:
        return Decision(
            False,
            NO_PROGRESS,
            f"stopped: no progress: the newest checkpoint is still that of step {step} after {wasted} restarts without a "
            f"newer one (max_no_progress={limits.max_no_progress}); last: {why}",
        )
    if restarts >= limits.max_restarts:
        return Decision(
            False,
            REQUEUE_LIMIT,
            f"stopped: requeue limit: {times} (max_restarts={limits.max_restarts}), at step {step}; last: {why}",
        )
    return Decision(True, REQUEUE, f"requeued at step {step}, restart {restarts + 1}: {why}")


def exhausted(chain: Chain, limits: Limits) -> Decision | None:
    """At a start: the end of a chain whose starts were killed before they could decide, once they reach the limits."""
    restarts, step = chain.restarts, int(chain.starts[-1]["step"]) if chain.starts else 0
    wasted = fruitless(chain.starts, step)
    if restarts > limits.max_restarts:
        text = f"stopped: requeue limit: {restarts} restarts (max_restarts={limits.max_restarts}), at step {step}"
        return Decision(False, REQUEUE_LIMIT, text)
    if wasted > limits.max_no_progress:
        text = (
            f"stopped: no progress: the newest checkpoint is still that of step {step} after {wasted} restarts without a "
            f"newer one (max_no_progress={limits.max_no_progress}); the starts before were killed"
        )
        return Decision(False, NO_PROGRESS, text)
    return None
