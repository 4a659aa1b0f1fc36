"""What the tasks of one start tell each other: failed-RANK.json and finished-RANK in the folder of the attempt."""

import os
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tarflow.cluster.exit_codes import FAILED, FINISHED
from tarflow.cluster.job.chain import AttemptResult
from tarflow.cluster.job.environment import Place
from tarflow.errors import why
from tarflow.files import create_empty, listed, open_own
from tarflow.records import DamagedFileError, Record, load_record, save_record

ANY = "failed"  # made after the first note; the folder has a thousand names where there are a thousand tasks


class FailureNote(Record):
    """How a task failed, for the others: failed-RANK.json in the folder of a start."""

    what: ClassVar[str] = "note of a failed task"

    code: int = Field(ge=0, le=255)
    text: str = ""
    node: str = Field("", pattern=r"^[A-Za-z0-9._-]*$")  # Slurm is told to exclude it
    stopped: bool = False


class TaskNotes:
    """The notes of one attempt. A restart in place is another attempt, with a folder of its own."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.folder, self.place = folder, place

    def record(self, result: AttemptResult) -> AttemptResult:
        """Let the other tasks know that this one failed or finished; returns the result."""
        if result.code == FINISHED:
            create_empty(self.folder / f"finished-{self.place.rank}")
        elif not result.stopped and self.place.size > 1:
            note = self.folder / f"failed-{self.place.rank}.json"
            if not note.exists():
                save_record(note, FailureNote(**vars(result)), shared=False)
            os.close(open_own(self.folder / ANY, os.O_WRONLY | os.O_CREAT))
        return result

    def anyone_failed(self) -> bool:
        """Whether any task has left a note of its failure: one look at one name, for tasks that look again and again."""
        return (self.folder / ANY).exists()

    def failure(self) -> AttemptResult | None:
        """The failure that most likely caused the others: a bad node, then a killed process, then the earliest."""
        files = sorted(listed(self.folder, "failed-*.json"), key=lambda p: (p.stat().st_mtime, p.name))
        failures = [read_failure(file) for file in files]
        return min(failures, key=lambda one: (not one.node, one.code < 128), default=None)

    def anyone_finished(self) -> bool:
        """Whether any task has finished: then there is nothing to restart."""
        return bool(listed(self.folder, "finished-*"))

    def first_finished(self) -> bool:
        """Whether rank 0 has finished."""
        return (self.folder / "finished-0").exists()


def read_failure(file: Path) -> AttemptResult:
    """A task's failure. An unreadable note still counts as one: that it exists is the message."""
    try:
        return AttemptResult(**load_record(file, FailureNote).model_dump())
    except (DamagedFileError, OSError) as error:
        return AttemptResult(FAILED, f"a task failed, and its note cannot be read: {why(error)}")
