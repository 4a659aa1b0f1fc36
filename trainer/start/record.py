"""RUN/data.json: the data a run was last started on, with the class names that a resumed run is checked against."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from tarflow.files import listed
from tarflow.records import Record, load_record, save_record
from tarflow.trainer.checkpoint.marker import MARKER
from tarflow.trainer.checkpoint.names import checkpoints_dir, is_checkpoint_name, parse_name

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


class CodeChange(Record):
    """Between two starts of a run, one of the user's functions became another: its name, or the file of its module."""

    setting: str  # data.dataset or data.transform
    before: Code | None
    now: Code | None
    checkpoint: str  # the newest one at that start: what was trained up to there saw the code before

    def __str__(self) -> str:
        """For the log, with both sides."""
        names = [f"{code.name} (SHA-256 {code.digest})" if code else "nothing" for code in (self.before, self.now)]
        return (
            f"{self.setting}: {names[0]} when the run was last started, {names[1]} now: images after {self.checkpoint} come "
            "from other code than those before"
        )


class DataRecord(DataSet):
    """data.json: the training data, and the held-out data."""

    validation: DataSet | None
    changed: list[CodeChange] = Field(default_factory=list)


def began(run_dir: Path) -> bool:
    """Whether a run has committed checkpoints, intact or not: work that must not be lost."""
    return bool(listed(checkpoints_dir(run_dir), f"*/{MARKER}"))


def code_changes(run_dir: Path, record: Mapping[str, object]) -> list[CodeChange]:
    """How the user's functions in `record` differ from those of the run's last start; nothing for a run without checkpoints.

    Raises DamagedFileError.
    """
    saved = [path.parent.name for path in listed(checkpoints_dir(run_dir), f"*/{MARKER}")]
    before = read_record(run_dir) if saved else None
    if before is None:
        return []
    newest = max(saved, key=lambda name: parse_name(name)[1] if is_checkpoint_name(name) else -1)
    found = []
    for name in ("dataset", "transform"):
        then, given = getattr(before, name), record.get(name)
        now = None if given is None else Code.model_validate(given)
        if (then and (then.name, then.digest)) != (now and (now.name, now.digest)):
            found.append(CodeChange(setting=f"data.{name}", before=then, now=now, checkpoint=newest))
    return found


def write_record(run_dir: Path, record: Mapping[str, object]) -> None:
    """Write data.json, replacing that of the last start, whose changes of code it goes on listing."""
    before = read_record(run_dir)
    changed = [*(before.changed if before else []), *code_changes(run_dir, record)]
    save_record(run_dir / NAME, DataRecord.model_validate({**record, "changed": changed}), shared=False)


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
