"""RUN/data.json: what a run was last started on. The names of its classes go on from there, and with each checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from tarflow.files import listed
from tarflow.records import Record, load_record, save_record
from tarflow.trainer.checkpoint.marker import MARKER
from tarflow.trainer.checkpoint.names import checkpoints_dir

NAME = "data.json"


class DataSet(Record):
    """What a run says of a set of images."""

    what = "what the run was started on"
    way_out = (
        "restore it from a copy, or remove it: the names of the run's classes are then not compared with the data's"
    )
    place: str
    fingerprint: str
    num_samples: int | None = Field(ge=0)
    classes: list[str] | None
    num_classes: int = Field(ge=0)
    image_size: list[int] | None  # width, height in pixels
    channels: int | None
    unchecked: str | None = None  # why what is fetched of it is not held against checksums


class DataRecord(DataSet):
    """data.json: the training images, and the held-out ones."""

    validation: DataSet | None


def began(run_dir: Path) -> bool:
    """Whether a run has committed checkpoints, sound or not: work that must not be lost."""
    return bool(listed(checkpoints_dir(run_dir), f"*/{MARKER}"))


def write_record(run_dir: Path, record: Mapping[str, object]) -> None:
    """Replace what the run says of its data."""
    save_record(run_dir / NAME, DataRecord.model_validate(record), shared=False)


def read_record(run_dir: Path) -> DataRecord | None:
    """What a run says of its data; None where it says nothing. Raises DamagedFileError."""
    try:
        return load_record(run_dir / NAME, DataRecord)
    except FileNotFoundError:
        return None


def recorded_classes(run_dir: Path) -> list[str] | None:
    """Names of the classes that a run was started on; None where it does not say. Raises DamagedFileError."""
    record = read_record(run_dir)
    return None if record is None else record.classes
