"""RUN/data.json: the data a run was last started on, with the class names that a resumed run is checked against."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from tarflow.files import listed
from tarflow.records import Record, load_record, save_record
from tarflow.trainer.checkpoint.marker import MARKER
from tarflow.trainer.checkpoint.names import checkpoints_dir

NAME = "data.json"


class Code(Record):
    """A function of the user's that the data go through."""

    name: str  # module:function
    file: str | None  # of its module
    digest: str | None  # of that file


class DataSet(Record):
    """A data set as data.json records it."""

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
    crop: str | None = None  # the rule by which images get the model's size; not recorded by earlier versions
    unchecked: str | None = None  # why remote shards are not verified against checksums
    dataset: Code | None = None
    transform: Code | None = None


class DataRecord(DataSet):
    """data.json: the training data, and the held-out data."""

    validation: DataSet | None


def began(run_dir: Path) -> bool:
    """Whether a run has committed checkpoints, intact or not: work that must not be lost."""
    return bool(listed(checkpoints_dir(run_dir), f"*/{MARKER}"))


def write_record(run_dir: Path, record: Mapping[str, object]) -> None:
    """Write data.json, replacing that of the last start."""
    save_record(run_dir / NAME, DataRecord.model_validate(record), shared=False)


def read_record(run_dir: Path) -> DataRecord | None:
    """Read data.json; None if there is none. Raises DamagedFileError."""
    try:
        return load_record(run_dir / NAME, DataRecord)
    except FileNotFoundError:
        return None


def recorded_classes(run_dir: Path) -> list[str] | None:
    """The class names that a run was started on; None if not recorded. Raises DamagedFileError."""
    record = read_record(run_dir)
    return None if record is None else record.classes
