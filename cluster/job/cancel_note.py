"""RUN/slurm/cancel-JOB: a job that finds it ends after its save, and is not started again.

It names the submission that it is for, so that a note that somebody left under a number of a later job ends nothing.
"""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tarflow.cluster.job.chain import JOB_ID
from tarflow.records import DamagedFileError, Record, load_record, save_record


class CancelNote(Record):
    """What `tarflow cancel` leaves for a job."""

    what: ClassVar[str] = "note that a job is cancelled"

    job: str = Field(pattern=JOB_ID)
    submission: str | None = None  # see Job; None: of a job that an earlier version submitted


def leave_note(slurm_dir: Path, job: str, submission: str | None) -> None:
    """Have a job end at its next save."""
    save_record(slurm_dir / f"cancel-{job}", CancelNote(job=job, submission=submission))


def is_cancelled(slurm_dir: Path, job: str, submission: str) -> bool:
    """Whether a person cancelled this very job. A note that cannot be read ends nothing: `tarflow cancel` waits for the end
    of the job, and takes it out of the queue itself if it goes on.
    """
    try:
        note = load_record(slurm_dir / f"cancel-{job}", CancelNote)
    except (DamagedFileError, OSError):
        return False
    return note.job == job and note.submission == submission
