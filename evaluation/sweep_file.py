"""The schema of `RUN/sweeps/NAME/sweep.json`, the record of a guidance sweep, and how its settings are written out."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tarflow.evaluation.result_file import Count, Number, Sha256, StandardError
from tarflow.records import DamagedFileError, Record, read_object
from tarflow.trainer.checkpoint.names import leading_name, parse_name

RECORD = "sweep.json"


class Setting(Record):
    """What a sweep varies."""

    guidance: Number
    denoise: Number
    attn_temp: Number
    # Where the sweep varied them:
    guidance_form: Literal["linear", "closed", "sigma"] | None = None
    guide_blocks: list[Annotated[int, Field(ge=-(1 << 10), lt=1 << 10)]] | None = Field(None, max_length=1 << 10)
    noise_level: Number | None = None
    denoise_steps: Count | None = None


class Scored(Setting):
    """The score of a candidate in a round."""

    distance: Number | None
    distance_stderr: StandardError | None = None
    lost: Count = 0


class Round(Record):
    """A round: all candidates scored on the same number of samples."""

    num_samples: int = Field(ge=1, lt=1 << 63)
    points: list[Scored] = Field(min_length=1)


class SweepFile(Record):
    """Every round, the best, the choice, all settings. Records from before standard errors have no `best` and `unclear`."""

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
    distance: Number
    distance_stderr: StandardError | None = None
    unclear: list[str] | None = None
    chosen: Setting | None
    features: dict[str, Any]
    reference: dict[str, Any]
    settings: dict[str, Any]


def shown_blocks(blocks: Iterable[int]) -> str:
    """Guided blocks as `--guide-blocks` takes them; none of them stands for all."""
    return "+".join(str(block) for block in blocks) or "all"


def shown_setting(setting: Mapping[str, Any]) -> str:
    """A sweep's setting on one line, such as "guidance 2, denoise 1, attn_temp 1, guidance_form closed"."""
    shown = {key: value for key, value in setting.items() if key in Setting.model_fields and value is not None}
    return ", ".join(f"{key} {_shown(value)}" for key, value in shown.items())


def shown_line(setting: Mapping[str, Any]) -> str:
    """What a line of a sweep's plot has in common: all but the guidance weight."""
    parts = [f"denoise {setting['denoise']:g}", f"attention temperature {setting['attn_temp']:g}"]
    if (form := setting.get("guidance_form")) is not None:
        parts.append(form)
    if (blocks := setting.get("guide_blocks")) is not None:
        parts.append(f"blocks {shown_blocks(blocks)}")
    if (level := setting.get("noise_level")) is not None:
        parts.append(f"noise level {level:g}")
    if (steps := setting.get("denoise_steps")) is not None:
        parts.append(f"{steps} steps")
    return ", ".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float | int) else shown_blocks(value)


def load_sweep(path: Path) -> dict[str, Any]:
    """The record at `.../NAME/sweep.json`.

    Raises DamagedFileError for one that is not valid, also where its best is not the best of its last round, and
    FileNotFoundError if there is none.
    """
    record = read_object(path, SweepFile)
    for field, problem in _contradictions(path.parent.name, record):
        raise DamagedFileError(path, problem, SweepFile.way_out, where=field, what=SweepFile.what)
    return record


def _contradictions(folder: str, record: dict[str, Any]) -> list[tuple[str, str]]:
    """Contradictions within a record, or to its folder, as (field, problem)."""
    found = []
    if record["name"] != folder:
        found.append(("name", f"it names {record['name']!r}, and is in {folder!r}"))
    checkpoint = leading_name(record["name"])
    kind, number = parse_name(checkpoint) if checkpoint else ("step", record["step"])
    if record[kind] != number:
        found.append((kind, f"{record[kind]}, and its name says {number}"))
    best = record.get("best") or record["chosen"]
    if best is None:
        return [*found, ("best", "it is missing")]
    last = [point for point in record["rounds"][-1]["points"] if point["distance"] is not None]
    first = min((point["distance"] for point in last), default=None)
    ours = [point["distance"] for point in last if all(point[key] == best[key] for key in best)]
    if ours != [first] or record["distance"] != first:
        found.append(("best", "it is not the best of the last round"))
    if record["chosen"] not in (None, best):
        found.append(("chosen", "it is not the best"))
    return found
