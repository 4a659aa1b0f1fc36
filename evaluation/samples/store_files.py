"""The models of what lies beside kept samples: SAMPLES/settings.json, and the notes of stretches of PNGs."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from tarflow.evaluation.result_file import Count
from tarflow.records import DamagedFileError, Record, load_record, read_object

SETTINGS = "settings.json"
STRETCH = re.compile(r"samples-(\d{8,18})-(\d{8,18})\.(tar|json)")  # first and last sample
Index = Annotated[str, Field(pattern="^[0-9]{1,18}$")]


class StoreFile(Record):
    """What decides the images, and what there was when all was complete."""

    model_config = ConfigDict(extra="allow")  # everything about weights and sampling
    what: ClassVar[str] = "settings of kept samples"
    way_out: ClassVar[str] = "move the folder away"

    kind: str
    num: Count = 0
    images: Count = 0
    nonfinite: list[Count] = Field(default_factory=list)
    files: dict[Annotated[str, Field(pattern=f"^{STRETCH.pattern}$")], Count] = Field(default_factory=dict)
    picture_bytes: Count = 0


class Note(Record):
    """That a stretch of PNGs is done: labels (-1: none) and bytes of its pictures, by sample."""

    what: ClassVar[str] = "a stretch of kept samples"

    labels: dict[Index, Annotated[int, Field(ge=-1, lt=1 << 31)]]
    sizes: dict[Index, Count] = Field(default_factory=dict)


def load_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder of kept samples. Raises DamagedFileError, and FileNotFoundError where there are none."""
    return {"files": {}, "picture_bytes": 0, "num": 0, **read_object(folder / SETTINGS, StoreFile)}


def load_note(path: Path) -> Note:
    """The note of a stretch. Raises DamagedFileError, also for samples that its name does not cover."""
    note = load_record(path, Note)
    name = STRETCH.fullmatch(path.name)
    strange = [i for i in note.labels if name is None or not int(name[1]) <= int(i) <= int(name[2])]
    if strange or (note.sizes and note.sizes.keys() != note.labels.keys()):  # without sizes: of version 0.1
        raise DamagedFileError(path, "its samples are not those of this stretch", Note.way_out, what=Note.what)
    return note
