"""The submitted jobs of a run: RUN/slurm/jobs.jsonl, a line for each, oldest first; and one that another follows."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from tarflow.cluster import slurm
from tarflow.cluster.exit_codes import IN_USE
from tarflow.cluster.job.chain import JOB_ID, Chain
from tarflow.errors import UserError, in_words
from tarflow.records import DamagedFileError, Record, append_record_line, as_record, read_lines

FILE = "jobs.jsonl"
NAME = "tarflow-"  # prefix of job names in Slurm's queue
LIMIT = 16 << 20  # bytes of the file; a line has about 300


class JobLine(Record):
    """A submitted job."""

    what: ClassVar[str] = "jobs of the run"
    way_out: ClassVar[str] = (
        "if `squeue --me` shows no job of this run beside those that its sound lines name, remove the line, or the file if it "
        "is empty"
    )

    job: str = Field(pattern=JOB_ID)
    kind: Literal["train", "evaluate"]
    time: float = Field(0.0, ge=0, lt=2**40)  # seconds since 1970
    logs: str = ""
    cluster: str | None = None
    host: str | None = None
    run: str | None = None  # its identity, see run.json
    submission: str | None = None  # see Job
    nodes: int = Field(1, ge=1)
    tasks_per_node: int = Field(1, ge=1)
    ranks_per_task: int = Field(1, ge=1, le=10**6)  # the processes of a task share its log


@dataclass
class Submissions:
    """The submitted jobs of a run, oldest first, and what is wrong with their file."""

    path: Path
    entries: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""  # if set, there may be jobs that are not in `entries`
    where: str = ""

    def checked(self) -> "Submissions":
        """The same, for decisions. Raises DamagedFileError if anything is wrong with the file."""
        if self.problem:
            raise DamagedFileError(self.path, self.problem, JobLine.way_out, where=self.where, what=JobLine.what)
        return self


def submissions(run_dir: Path) -> Submissions:
    """The jobs in a run's file, without lines that are damaged or another run's."""
    found = Submissions(run_dir / "slurm" / FILE)
    if not os.path.lexists(found.path):
        return found
    own = _run_id(run_dir)
    try:
        if found.path.is_symlink() or not found.path.is_file() or found.path.stat().st_size > LIMIT:
            found.problem = "it is a link, not a regular file, or larger than any list of jobs"
            return found
        lines = read_lines(found.path)
    except OSError as error:
        found.problem = in_words(error)
        return found
    # Only noted: showing jobs survives a damaged line, deciding by them (`checked`) does not.
    if lines.damaged or lines.torn:
        found.problem = str(lines) or "the last line has no end"
    elif lines.emptied:
        found.problem = "it is empty, and is made with its first line"
    for row in lines.rows:
        try:
            line = as_record(row, JobLine)
        except ValueError as error:
            found.problem, found.where = str(error), f"job {row.get('job')!r}"
            continue
        if own is not None and line.run not in (None, own):
            found.problem, found.where = f"it belongs to the run {line.run}, and this is {own}", f"job {line.job}"
            continue
        found.entries.append(line.model_dump())
    return found


def _run_id(run_dir: Path) -> str | None:
    """The run's identity; None if it is unreadable, which others report."""
    from tarflow.trainer.run_dir import is_run, run_id  # here: tasks of a job but the first load no configuration

    with suppress(UserError, OSError, ValueError, KeyError):
        return run_id(run_dir) if is_run(run_dir) else None
    return None


def note_job(run_dir: Path, kind: str, job: str, logs: Path, submission: str, **more: Any) -> None:
    """Add a job to its run's file. `logs`: the folder of its log, which elements of a sweep share."""
    row = {
        "job": job, "kind": kind, "time": time.time(), "logs": str(logs), "cluster": slurm.cluster_name(),
        "host": os.uname().nodename, "run": _run_id(run_dir), "submission": submission, **more,
    }  # fmt: skip
    append_record_line(run_dir / "slurm" / FILE, as_record(row, JobLine).model_dump())


@dataclass
class RunJobs:
    """The jobs of a run and what is known about them."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    states: dict[str, slurm.JobState] = field(default_factory=dict)  # of jobs that Slurm was asked about
    elsewhere: dict[str, str] = field(default_factory=dict)  # job -> another cluster, which cannot be asked from here
    run_dir: Path = Path()
    problem: str = ""  # of the file that names them: there may be others

    @property
    def live(self) -> list[dict[str, Any]]:
        """Jobs in the queue: running or waiting."""
        return [e for e in self.entries if (state := self.states.get(e["job"])) is not None and state.live]

    @property
    def unknown(self) -> list[dict[str, Any]]:
        """Jobs that Slurm cannot be asked about and whose own record has no readable end."""
        asked = [e for e in self.entries if e["job"] not in self.states]
        return [e for e in asked if Chain.shown(self.run_dir / "slurm", e["job"]).ended is None]

    def describe(self, entry: dict[str, Any]) -> str:
        """A job and its state, in words."""
        job = entry["job"]
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["time"]))
        source = f"submitted {since}" + (f" on {entry['host']}" if entry["host"] else "")
        if (state := self.states.get(job)) is not None:
            where = f" on {state.nodes}" if state.nodes else ""
            return f"{entry['kind']} job {job} ({state.state or 'not in the queue'}{where}, {source})"
        why = f"it belongs to the cluster {self.elsewhere[job]}" if job in self.elsewhere else "squeue does not answer"
        return f"{entry['kind']} job {job} ({source}; whether it runs is not known here: {why})"


def jobs_of(run_dirs: list[Path], kind: str | None = None) -> dict[Path, RunJobs]:
    """The jobs of each run, with a single query to Slurm. Job ids of other clusters are not looked up here."""
    found = {}
    for run_dir in run_dirs:
        known = submissions(run_dir)
        entries = [e for e in known.entries if kind in (None, e["kind"])]
        found[run_dir] = RunJobs(entries, run_dir=run_dir, problem=known.problem)
    here = slurm.cluster_name() if any(e["cluster"] for j in found.values() for e in j.entries) else None
    for jobs in found.values():
        for entry in jobs.entries:
            if here and entry["cluster"] not in (None, here):
                jobs.elsewhere[entry["job"]] = entry["cluster"]
    states = slurm.states([e["job"] for j in found.values() for e in j.entries if e["job"] not in j.elsewhere])
    for jobs in found.values():
        ours = [e["job"] for e in jobs.entries if e["job"] not in jobs.elsewhere]
        jobs.states = {job: _if_ours(states[job]) for job in ours if job in states}
    return found


def _if_ours(state: slurm.JobState) -> slurm.JobState:
    """The state, unless the queue has another job under this id: then the run's job is over."""
    return state if not state.name or state.name.startswith(NAME) else slurm.JobState("")


def job_name(folder: Path, kind: str) -> str:
    """The name of a run's or a sweep's jobs in Slurm's queue."""
    return f"{NAME}{folder.name}" + ("-eval" if kind == "evaluate" else "")


class Followed:
    """The training that an evaluation follows: whether it has ended early.

    A job that was queued behind the followed one may go on with the run; one that found the run in use leaves it to the
    job before.
    """

    def __init__(self, slurm_dir: Path, job: str, look_every_s: float = 60.0) -> None:
        self.slurm_dir, self.job, self.look_every_s = slurm_dir, job, look_every_s
        self.next_look = time.monotonic() + look_every_s
        self.gone = 0  # looks in a row that have found none of the jobs in the queue

    def ended_early(self) -> str:
        """How it ended, in words; empty while it may still go on, or when it finished."""
        jobs = [entry["job"] for entry in submissions(self.slurm_dir.parent).entries if entry["kind"] == "train"]
        jobs = jobs if self.job in jobs else [self.job]
        chains = [Chain.shown(self.slurm_dir, one) for one in jobs]
        first = jobs.index(self.job)
        while first > 0 and (ended := chains[first].ended) is not None and ended["code"] == IN_USE:
            first -= 1
        may_go_on = [job for job, chain in zip(jobs[first:], chains[first:]) if not chain.failed]
        if may_go_on:
            finished = any(chain.ended for chain in chains[first:] if not chain.failed)
            return "" if finished or not self._killed(may_go_on) else f"{self._named} was ended before it could note it"
        return f"{self._named} has ended: {chains[-1].ended['text']}" if chains[-1].ended else ""

    @property
    def _named(self) -> str:
        return f"training job {self.job}"

    def _killed(self, jobs: list[str]) -> bool:
        """Whether Slurm knows none of these jobs any more: they were killed before they could record their end.

        It is asked seldom, and believed the second time: between two starts a job may be nowhere for a moment.
        """
        if time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + self.look_every_s
            states = slurm.states(jobs)
            over = len(states) == len(jobs) and not any(_if_ours(state).live for state in states.values())
            self.gone = self.gone + 1 if over else 0
        return self.gone > 1
