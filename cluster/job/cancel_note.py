"""RUN/slurm/cancel-JOB: a job that finds it ends after its save and is not requeued.

It names its submission, so that a note left under the number of a later job has no effect.
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
    submission: str | None = None  # see Job; None for a job submitted by an earlier version


def leave_note(slurm_dir: Path, job: str, submission: str | None) -> None:
    """Have a job end at its next save."""
    save_record(slurm_dir / f"cancel-{job}", CancelNote(job=job, submission=submission))


def is_cancelled(slurm_dir: Path, job: str, submission: str) -> bool:
    """Whether a person cancelled this very job.

    An unreadable note is ignored: `tarflow cancel` waits for the job to end, and removes it from the queue if it goes on.
    """
    try:
        note = load_record(slurm_dir / f"cancel-{job}", CancelNote)
    except (DamagedFileError, OSError):
        return False
    return note.job == job and note.submission == submission
