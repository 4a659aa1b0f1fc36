"""Schemas of the records beside stored samples: SAMPLES/settings.json, and a note for each range of PNGs."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from tarflow.evaluation.result_file import Count
from tarflow.records import DamagedFileError, Record, load_record, read_object

SETTINGS = "settings.json"
ARRAY = "samples.npz"  # all samples as one array, beside the shards that it is made from
RANGE_NAME = re.compile(r"samples-(\d{8,18})-(\d{8,18})\.(tar|json)")  # first and last sample
Index = Annotated[str, Field(pattern="^[0-9]{1,18}$")]


class StoreFile(Record):
    """What determines the images, and what was there once all were complete."""

    model_config = ConfigDict(extra="allow")  # weights and sampling settings
    what: ClassVar[str] = "settings of stored samples"
    way_out: ClassVar[str] = "move the folder away"

    kind: str
    num: Count = 0
    images: Count = 0
    nonfinite: list[Count] = Field(default_factory=list)
    files: dict[Annotated[str, Field(pattern=f"^{RANGE_NAME.pattern}$")], Count] = Field(default_factory=dict)
    picture_bytes: Count = 0
    array_bytes: Count = 0


class Note(Record):
    """A completed range of PNGs: labels (-1 = none) and sizes in bytes of its pictures, by sample."""

    what: ClassVar[str] = "a range of stored samples"

    labels: dict[Index, Annotated[int, Field(ge=-1, lt=1 << 31)]]
    sizes: dict[Index, Count] = Field(default_factory=dict)


def load_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder of stored samples. Raises DamagedFileError, and FileNotFoundError if there are none."""
    return {"files": {}, "picture_bytes": 0, "array_bytes": 0, "num": 0, **read_object(folder / SETTINGS, StoreFile)}


def load_note(path: Path) -> Note:
    """The note of a range. Raises DamagedFileError, also for samples outside the range in its name."""
    note = load_record(path, Note)
    name = RANGE_NAME.fullmatch(path.name)
    strange = [i for i in note.labels if name is None or not int(name[1]) <= int(i) <= int(name[2])]
    if strange or (note.sizes and note.sizes.keys() != note.labels.keys()):  # version 0.1 wrote no sizes
        raise DamagedFileError(path, "its samples are not those of this range", Note.way_out, what=Note.what)
    return note
