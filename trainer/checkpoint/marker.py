"""COMMITTED, the marker of a checkpoint: what it records, and whether directory and files agree with it."""

import heapq
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tarflow.files import crc32
from tarflow.records import DamagedFileError, Record, load_record
from tarflow.trainer.checkpoint.metadata import NAME as METADATA
from tarflow.trainer.checkpoint.metadata import WAY_OUT, read_metadata
from tarflow.trainer.checkpoint.names import parse_name
from tarflow.trainer.config.files import load_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.run_dir import RunId

MARKER = "COMMITTED"
CONFIG = "config.yaml"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileFacts(_Part):
    """Size and checksum of a checkpoint's file."""

    size: int = Field(ge=0, lt=1 << 60)  # bytes
    crc32: int = Field(ge=0, lt=1 << 32)


class Code(_Part):
    """The code that wrote a checkpoint, as `code_version` gives it."""

    version: str = Field(max_length=100)
    commit: str | None = Field(None, max_length=100)
    dirty: bool | None = None


def _plain(name: str) -> str:
    if name in ("", ".", "..", MARKER) or "/" in name or "\\" in name or not name.isprintable() or len(name) > 255:
        raise ValueError("a file's name must be a plain one")
    return name


class Marker(Record):
    """COMMITTED. `run` must agree with run.json, and the counter with the directory's name."""

    what = "marker of a checkpoint"
    way_out = WAY_OUT
    step: int = Field(ge=0, le=10**15)  # optimizer steps taken until then
    images_seen: int = Field(ge=0, le=10**15)
    run: RunId
    world_size: int | None = Field(None, ge=1, le=10**6)  # ranks that wrote it
    config: str | None = Field(None, max_length=100)  # digest of the configuration
    data: str | None = Field(None, max_length=200)  # fingerprint of the training images
    classes: list[str] | None = None
    code: Code | None = None
    files: dict[Annotated[str, AfterValidator(_plain)], FileFacts]


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path
    step: int  # optimizer steps taken until then; for people: the order is by images
    images_seen: int
    info: dict[str, Any]

    @classmethod
    def of(cls, path: Path, marker: Marker) -> "Checkpoint":
        """The checkpoint in a directory whose marker was read."""
        return cls(path, marker.step, marker.images_seen, marker.model_dump(exclude_none=True))

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.name

    @property
    def sizes(self) -> dict[str, int]:
        """Size in bytes of each of its files, by name."""
        return {name: int(facts["size"]) for name, facts in self.info["files"].items()}

    @property
    def num_bytes(self) -> int:
        """Total size of its files."""
        return sum(self.sizes.values())


Damage = Callable[[Checkpoint], str | None]  # what is wrong with its files; None: nothing


class Reason(Enum):
    """Why a directory is not a usable checkpoint."""

    UNCOMMITTED = auto()  # a save or a removal was interrupted; what is left counts for nothing
    REPLACED = auto()  # whole, renamed to make room for a save that was interrupted
    OTHER_RUN = auto()
    DAMAGED = auto()  # it was whole once


@dataclass(frozen=True)
class Unusable:
    """A directory that is not a usable checkpoint: the reason for programs, and the text for people."""

    reason: Reason
    text: str
    run: str = ""  # OTHER_RUN: the one that it belongs to

    @property
    def committed(self) -> bool:
        """Whether it was whole once."""
        return self.reason is not Reason.UNCOMMITTED

    @property
    def ours(self) -> bool:
        """Whether it was whole once, and this run's."""
        return self.committed and self.reason is not Reason.OTHER_RUN

    def __str__(self) -> str:
        return self.text


def is_marked(path: Path) -> bool:
    """Whether a directory has a marker, whatever it contains."""
    return os.path.lexists(path / MARKER)


def inspect(path: Path, owner: str | None) -> Checkpoint | Unusable:
    """The checkpoint in a directory, or why there is none. `owner`: the run that it must belong to (None: any).

    Looks at the names and sizes of its files only; `damage` reads their bytes.
    """
    never = Unusable(Reason.UNCOMMITTED, "it was never committed")
    if not is_marked(path):
        return never
    try:
        marker = load_record(path / MARKER, Marker)
    except DamagedFileError as error:
        where = f"{error.where}: " if error.where else ""
        return Unusable(Reason.DAMAGED, f"its {MARKER} marker is damaged: {where}{error.problem}")
    except FileNotFoundError:
        # Removed between the two looks at it, or else a link that leads nowhere.
        return Unusable(Reason.DAMAGED, f"its {MARKER} marker is damaged") if is_marked(path) else never
    if owner is not None and marker.run != owner:
        return Unusable(Reason.OTHER_RUN, "it belongs to another run", run=marker.run)
    if problem := _contradiction(path.name, marker) or _missing(path, marker):
        return Unusable(Reason.DAMAGED, problem)
    return Checkpoint.of(path, marker)


def _contradiction(name: str, marker: Marker) -> str | None:
    kind, number = parse_name(name)
    said = marker.step if kind == "step" else marker.images_seen
    if said != number:
        return f"its {MARKER} marker says {kind} {said}"
    if marker.step > marker.images_seen:
        return f"its {MARKER} marker says {marker.step} steps of {marker.images_seen} images"
    for needed in (METADATA, CONFIG):
        if needed not in marker.files:
            return f"its {MARKER} marker does not list {needed}"
    return None


def _missing(path: Path, marker: Marker) -> str | None:
    """The first file that is missing or has another size than it had."""
    for name, facts in marker.files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            return f"its file {name} is missing"
        if size != facts.size:
            return f"its file {name} has {size} bytes instead of {facts.size}"
    return None


def _wrong(file: Path, checksum: int) -> str | None:
    try:
        return f"the checksum of its file {file.name} is wrong" if crc32(file) != checksum else None
    except FileNotFoundError:  # removed at this moment
        return f"its file {file.name} is missing"


def damage(checkpoint: Checkpoint, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint's files; None if they are intact. Reads all of them.

    Wrong is a checksum, or a tensor whose bytes are in none of the files. One of several `ranks` looks at its share only:
    about as many bytes as each other, and the last one at the list of tensors as well.
    """
    reader = _readers(checkpoint.sizes, ranks)
    for name, facts in checkpoint.info["files"].items():
        if reader[name] == rank and (problem := _wrong(checkpoint.path / name, facts["crc32"])):
            return problem
    if rank == ranks - 1:
        try:
            read_metadata(checkpoint.path, checkpoint.sizes)
        except DamagedFileError as error:
            return f"its file {METADATA}: {error.problem}"
    return None


def _readers(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    """Which of some ranks reads each file: the largest first, each by the one that has the fewest bytes so far."""
    loads = [(0, rank) for rank in range(ranks)]  # a heap
    readers = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        load, readers[name] = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[name], readers[name]))
    return readers


def require_file(checkpoint: Checkpoint, name: str) -> None:
    """Raise DamagedFileError if a file of a checkpoint is not what was committed. Reads this file only."""
    if problem := _wrong(checkpoint.path / name, checkpoint.info["files"][name]["crc32"]):
        raise DamagedFileError(checkpoint.path, problem, WAY_OUT)


def config_of(checkpoint: Checkpoint) -> Config:
    """The configuration that a checkpoint was trained with. Raises DamagedFileError if it is not what was committed."""
    require_file(checkpoint, CONFIG)
    return load_config(checkpoint.path / CONFIG)


def beside(checkpoint: Checkpoint) -> list[str]:
    """Names of files in a checkpoint's directory that were not committed with it."""
    return sorted({p.name for p in checkpoint.path.iterdir()} - {MARKER, *checkpoint.info["files"]})


def require_whole(checkpoint: Checkpoint) -> None:
    """Raise DamagedFileError if anything is wrong with a checkpoint's files. Reads all of them."""
    if problem := damage(checkpoint):
        raise DamagedFileError(checkpoint.path, problem, WAY_OUT)
