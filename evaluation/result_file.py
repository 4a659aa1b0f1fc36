"""The model of a result's file: what `result.json` must hold, and that it lies where it belongs.

A result says itself of which run, checkpoint, weights and settings it is, and its directory's name says it again: a result
that was copied, renamed or changed is not taken for another's.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from tarflow.evaluation.metrics.names import is_distance, is_kernel
from tarflow.records import DamagedFileError, Record, read_object
from tarflow.trainer.checkpoint.names import leading_name, parse_name

RESULT = "result.json"
WORK = "work.json"  # who did it and how long it took: apart, so that equal settings give equal result files
FORMAT = 2
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
# Figures are those of float32 networks: what is larger is none, and no plot could show it.
Figure = Annotated[float, Field(ge=-1e38, le=1e38)]
StandardError = Annotated[float, Field(ge=0, le=1e38)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Open(Record):
    """Part of a result with fields beside those that are looked at."""

    model_config = ConfigDict(extra="allow")


class Sampling(_Open):
    """How its samples were drawn."""

    guidance: Figure
    guide: str
    attn_temp: Figure
    annealed: bool
    denoise: Figure
    noise_std: Figure
    param_dtype: str
    seed: Count
    labels: str | list[int]
    class_counts: list[Count] | None = None


class Settings(_Open):
    """Everything that decides its figures."""

    weights: str
    sampling: Sampling
    num_samples: Count
    features: str


class Samples(_Open):
    """What became of the samples."""

    asked: Count
    used: Count
    nonfinite: Count


class Neighbours(_Open):
    """How near the samples are to training images."""

    samples: Count
    training_images: Count
    nearest_rms_median: Figure
    nearest_rms_min: Figure


class ResultFile(Record):
    """`result.json`. Besides these fields it has scores named after the feature network, and no others."""

    model_config = ConfigDict(extra="allow")
    what: ClassVar[str] = "a result"
    way_out: ClassVar[str] = "move its directory away, and `tarflow evaluate` makes it again"

    format: int = Field(ge=1, le=FORMAT)
    name: str = Field(min_length=1, max_length=255)
    run: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None
    weights: str
    weights_sha256: Sha256
    step: Count | None
    images_seen: Count | None
    provenance: dict[str, Any] = Field(default_factory=dict)
    status: Literal["ok", "failed"]
    problem: str | None
    samples: Samples
    distance_terms: dict[str, Figure] = Field(default_factory=dict)
    distance_stderr: StandardError | None = None
    kernel_stderr: StandardError | None = None
    kernel_estimate: str | None = None
    precision: Figure | None = None
    recall: Figure | None = None
    density: Figure | None = None
    coverage: Figure | None = None
    inception_score: Figure | None = None
    inception_score_std: Figure | None = None
    kept_features: list[Count] = Field(default_factory=list)
    warnings: list[str]
    identical_images: Count | None = None
    reference: dict[str, Any]
    bits_per_dim: Figure | None
    bits_per_dim_stderr: StandardError | None
    likelihood: dict[str, Any]
    label_agreement: Share | None
    neighbours: Neighbours | None = None
    grid_rows: list[Annotated[str, Field(max_length=1000)]] | None
    num_samples: Count
    nonfinite: Count
    features: dict[str, Any]
    settings: Settings
    settings_hash: str = Field(pattern="^[0-9a-f]{12}$")

    @model_validator(mode="after")
    def _scores(self) -> "ResultFile":
        for key, value in (self.model_extra or {}).items():
            if not (is_distance(key) or is_kernel(key)):
                raise ValueError(f"there is no field {key!r} in a result")
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e38
            ):
                raise ValueError(f"{key} is no figure")
        return self


class WorkFile(Record):
    """`work.json`."""

    what: ClassVar[str] = "how long a result took"
    way_out: ClassVar[str] = "remove it: no figure depends on it"

    seconds: dict[str, Annotated[float, Field(ge=0, le=1e12)]]
    workers: dict[str, list[str]] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    time: float = Field(ge=0, le=1e12)  # when it was finished, in seconds since 1970
    code: Any = None


def settings_digest(settings: dict[str, Any]) -> str:
    """Twelve hex digits: what tells results of one checkpoint apart."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def load_result(folder: Path, run: str | None) -> dict[str, Any]:
    """The result in a directory. `run`: whose it must be; None: anyone's.

    Raises DamagedFileError for one that cannot be believed, and FileNotFoundError where there is none.
    """
    value = read_object(folder / RESULT, ResultFile)
    for field, problem in _misfits(folder.name, value, run):
        raise DamagedFileError(folder / RESULT, problem, ResultFile.way_out, where=field, what=ResultFile.what)
    return value


def load_work(folder: Path) -> dict[str, Any]:
    """What is said about the work on a result; nothing where nothing is. Raises DamagedFileError."""
    try:
        return read_object(folder / WORK, WorkFile)
    except FileNotFoundError:
        return {}


def _misfits(folder: str, value: dict[str, Any], run: str | None) -> list[tuple[str, str]]:
    """What contradicts itself, the run or the directory's name, as (field, problem)."""
    name, digest = value["name"], value["settings_hash"]
    found = []
    if run is not None and value["run"] != run:
        found.append(("run", f"it belongs to the run {value['run']}, and this is {run}"))
    if name != folder:
        found.append(("name", f"it is that of {name!r}, and lies in {folder!r}"))
    if settings_digest(value["settings"]) != digest:
        found.append(("settings_hash", f"{digest} is not the digest of its settings"))
    if checkpoint := leading_name(name):
        kind, number = parse_name(checkpoint)
        names = {checkpoint, f"{checkpoint}-{digest}"}
        if value[kind] != number:
            found.append((kind, f"{value[kind]}, and its name says {number}"))
        if value["step"] is None or value["images_seen"] is None:
            found.append(("step", "a checkpoint's result has a step and a number of images seen"))
    else:
        names = {f"weights-{value['weights_sha256'][:12]}-{digest}"}
    if name not in names:
        found.append(("name", f"{name!r} does not fit its weights and settings: {', '.join(sorted(names))} would"))
    if value["num_samples"] != value["samples"]["used"] or value["nonfinite"] != value["samples"]["nonfinite"]:
        found.append(("num_samples", "it contradicts the field samples"))
    return found
