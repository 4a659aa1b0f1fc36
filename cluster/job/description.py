"""What a Slurm job does: RUN/slurm/jobs/job-SUBMISSION.json, written before the job is submitted.

Its digest is in the batch script, of which Slurm keeps its own copy: a job runs exactly what was submitted, whoever can write
to the run directory.
"""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.chain import Limits
from tarflow.records import DamagedFileError, Record, load_record, read_bounded, save_record

Device = Literal["auto", "cpu", "cuda", "mps"]
LAG_S = 60.0  # a network file system may show a new file this late


class Job(Record):
    """One run's training, or the evaluation beside it."""

    kind: Literal["train", "evaluate"]
    run_dir: str
    run: str  # its identity, see run.json
    submission: str = Field(pattern=r"^[0-9a-f]{32}$")  # drawn: names this submission alone
    code: str  # the snapshot that it runs
    arguments: tuple[str, ...]  # of `python -m tarflow`
    resubmit: str  # the command that goes on by hand
    limits: Limits
    gpus: int = Field(0, ge=0)  # of each node, that must do the work: none if the run is to train on the CPU
    device: Device = "auto"  # train.device
    min_free_gb: float = Field(0.0, ge=0)
    preflight: Literal["off", "files", "full"] = "full"
    preflight_timeout: float = Field(180.0, gt=0)  # seconds
    follows: str | None = None  # evaluate: the training job whose end ends it
    ranks_per_task: int = Field(1, ge=1)  # processes that each Slurm task starts
    restarts_in_place: int = Field(0, ge=0)  # after a failed process: all start again, and the allocation is kept


class Description(Record):
    """A job, or the elements of an array in their order."""

    what: ClassVar[str] = "description of a Slurm job"
    way_out: ClassVar[str] = "submit the run again"

    format: Literal[3] = 3  # 1 and 2 were pickles
    jobs: tuple[Job, ...] = Field(min_length=1)


def save_description(path: Path, jobs: tuple[Job, ...]) -> str:
    """Write the description of jobs; returns its digest."""
    save_record(path, Description(jobs=jobs))
    return _digest(path)


def load_job(path: Path, digest: str, env: Mapping[str, str], wait_s: float = LAG_S) -> Job:
    """The job of which this process is a task.

    Raises:
        DamagedFileError: the file is not the one that was submitted.
        ClusterError: the file does not appear, has no such element, or is of another run directory.

    """
    end = time.monotonic() + wait_s
    while not path.exists():
        if time.monotonic() > end:
            raise ClusterError(f"{path} is not there: it was removed, or this node does not see the run directory")
        time.sleep(1)
    if _digest(path) != digest:
        raise DamagedFileError(
            path, "it is not what was submitted: its digest is another one", Description.way_out, what=Description.what
        )
    jobs = load_record(path, Description).jobs
    number = int(env.get("SLURM_ARRAY_TASK_ID", "0"))
    if number >= len(jobs):
        raise ClusterError(f"{path} describes {len(jobs)} elements, and this is element {number} of an array")
    run_dir = Path(jobs[number].run_dir)
    if path.parent not in [folder / "slurm" / "jobs" for folder in (run_dir, run_dir.parent)]:
        raise ClusterError(
            f"{path} describes a job of {run_dir}, where it does not lie: the run was moved; submit again"
        )
    return jobs[number]


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_bounded(path)).hexdigest()
    except ValueError as error:
        raise DamagedFileError(path, str(error), Description.way_out, what=Description.what) from None
