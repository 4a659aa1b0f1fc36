"""The model of `RUN/sweeps/NAME/sweep.json`, the record of a guidance sweep."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from tarflow.evaluation.result_file import Count, Figure, Sha256, StandardError
from tarflow.records import DamagedFileError, Record, read_object
from tarflow.trainer.checkpoint.names import leading_name, parse_name

RECORD = "sweep.json"


class Setting(Record):
    """What a sweep varies."""

    guidance: Figure
    denoise: Figure
    attn_temp: Figure


class Scored(Setting):
    """A setting in a round."""

    distance: Figure | None
    distance_stderr: StandardError | None = None
    lost: Count = 0


class Round(Record):
    """A round: so many samples for each of these settings."""

    num_samples: int = Field(ge=1, lt=1 << 63)
    points: list[Scored] = Field(min_length=1)


class SweepFile(Record):
    """Every round, the best, the choice, all settings. Those of before standard errors have no `best` and `unclear`."""

    what: ClassVar[str] = "the record of a sweep"
    way_out: ClassVar[str] = "remove its folder to do the sweep again"

    name: str
    weights: str
    weights_sha256: Sha256
    step: Count
    images_seen: Count
    metric: str
    rounds: list[Round] = Field(min_length=1)
    best: Setting | None = None
    distance: Figure
    distance_stderr: StandardError | None = None
    unclear: list[str] | None = None
    chosen: Setting | None
    features: dict[str, Any]
    reference: dict[str, Any]
    settings: dict[str, Any]


def load_sweep(path: Path) -> dict[str, Any]:
    """The record at `.../NAME/sweep.json`.

    Raises DamagedFileError for one that cannot be believed, also where its best is not the best of its last round, and
    FileNotFoundError where there is none.
    """
    record = read_object(path, SweepFile)
    for field, problem in _misfits(path.parent.name, record):
        raise DamagedFileError(path, problem, SweepFile.way_out, where=field, what=SweepFile.what)
    return record


def _misfits(folder: str, record: dict[str, Any]) -> list[tuple[str, str]]:
    """What contradicts itself or the folder's name, as (field, problem)."""
    found = []
    if record["name"] != folder:
        found.append(("name", f"it is that of {record['name']!r}, and lies in {folder!r}"))
    checkpoint = leading_name(record["name"])
    kind, number = parse_name(checkpoint) if checkpoint else ("step", record["step"])
    if record[kind] != number:
        found.append((kind, f"{record[kind]}, and its name says {number}"))
    best = record.get("best") or record["chosen"]
    if best is None:
        return [*found, ("best", "it has none")]
    last = [point for point in record["rounds"][-1]["points"] if point["distance"] is not None]
    first = min((point["distance"] for point in last), default=None)
    ours = [point["distance"] for point in last if all(point[key] == best[key] for key in best)]
    if ours != [first] or record["distance"] != first:
        found.append(("best", "it is not the best of the last round"))
    if record["chosen"] not in (None, best):
        found.append(("chosen", "it is not the best"))
    return found
