"""The schema of a result's files, `result.json` and `work.json`, and the check that a result is where it belongs.

A result names its run, checkpoint, weights and settings, and so does its directory: one that was copied, renamed or changed
is never mistaken for another.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from tarflow.evaluation.metrics.names import is_distance, is_kernel, is_spatial
from tarflow.records import DamagedFileError, Record, read_object
from tarflow.trainer.checkpoint.names import leading_name, parse_name

RESULT = "result.json"
WORK = "work.json"  # who computed it and how long it took: separate, so that equal settings give equal result files
FORMAT = 2
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
# Networks compute in float32: a larger number is damage, and could not be plotted.
Number = Annotated[float, Field(ge=-1e38, le=1e38)]
StandardError = Annotated[float, Field(ge=0, le=1e38)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Open(Record):
    """Part of a result with more fields than those checked here."""

    model_config = ConfigDict(extra="allow")


class Sampling(_Open):
    """How the samples were drawn."""

    guidance: Number
    guide: str
    attn_temp: Number
    annealed: bool
    denoise: Number
    noise_std: Number
    param_dtype: str
    seed: Count
    labels: str | list[int]
    class_counts: list[Count] | None = None
    noise_level: Number | None = None  # these five of a model that is told the noise level
    denoise_to: Number | None = None
    denoise_steps: Count | None = None
    denoise_schedule: str | None = None
    denoise_stochastic: bool | None = None


class Settings(_Open):
    """Everything that decides the metrics."""

    weights: str
    sampling: Sampling
    num_samples: Count
    features: str


class Samples(_Open):
    """How many samples were drawn, used and lost."""

    asked: Count
    used: Count
    nonfinite: Count


class Neighbours(_Open):
    """How near the samples are to training images."""

    samples: Count
    training_images: Count
    nearest_rms_median: Number
    nearest_rms_min: Number


class ResultFile(Record):
    """`result.json`: these fields, and metrics named after the feature network."""

    model_config = ConfigDict(extra="allow")
    what: ClassVar[str] = "a result"
    way_out: ClassVar[str] = "move its directory away, and `tarflow evaluate` computes it again"

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
    sampling_plan: dict[str, Any] | None = None  # how each block was inverted; none where token by token in torch
    distance_terms: dict[str, Number] = Field(default_factory=dict)
    distance_stderr: StandardError | None = None
    spatial_stderr: StandardError | None = None
    kernel_stderr: StandardError | None = None
    kernel_estimate: str | None = None
    precision: Number | None = None
    recall: Number | None = None
    density: Number | None = None
    coverage: Number | None = None
    inception_score: Number | None = None
    inception_score_std: Number | None = None
    kept_features: list[Count] = Field(default_factory=list)
    warnings: list[str]
    identical_images: Count | None = None
    reference: dict[str, Any]
    bits_per_dim: Number | None
    bits_per_dim_stderr: StandardError | None
    likelihood: dict[str, Any]
    label_agreement: Share | None
    neighbours: Neighbours | None = None
    grid_rows: list[Annotated[str, Field(max_length=1000)]] | None
    num_samples: Count
    nonfinite: Count
    features: dict[str, Any]
    float32: dict[str, Literal["highest", "high", "medium"]] | None = None  # precision of products, by part
    settings: Settings
    settings_hash: str = Field(pattern="^[0-9a-f]{12}$")

    @model_validator(mode="after")
    def _scores(self) -> "ResultFile":
        for key, value in (self.model_extra or {}).items():
            if not (is_distance(key) or is_kernel(key) or is_spatial(key)):
                raise ValueError(f"a result has no field {key!r}")
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e38
            ):
                raise ValueError(f"{key} is not a number")
        return self


class WorkFile(Record):
    """`work.json`."""

    what: ClassVar[str] = "how long a result took"
    way_out: ClassVar[str] = "remove it: no metric depends on it"

    seconds: dict[str, Annotated[float, Field(ge=0, le=1e12)]]
    workers: dict[str, list[str]] = Field(default_factory=dict)
    batches: dict[str, list[Count]] = Field(default_factory=dict)  # stage -> images at a time, of all workers
    machine: dict[str, Any] = Field(default_factory=dict)
    time: float = Field(ge=0, le=1e12)  # when it was finished, in seconds since 1970
    code: Any = None


LIKELIHOOD_PICTURES = {"most": "likelihood.most.png", "least": "likelihood.least.png"}
Ranked = Annotated[list[tuple[Count, Number]], Field(max_length=1000)]  # (number of an image, its bits per dimension)


class Histogram(Record):
    """Images by their bits per dimension, in equal bins."""

    low: Number
    high: Number
    counts: list[Count] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _some(self) -> "Histogram":
        if not self.low < self.high or not 0 < sum(self.counts) < 1 << 53:
            raise ValueError("it holds no images")
        return self


class LikelihoodFile(Record):
    """`likelihood.json` of a folder that `tarflow likelihood` wrote; the rest is compared with what is asked.

    Earlier versions wrote no histogram, and no pictures of the most and least likely images.
    """

    model_config = ConfigDict(extra="allow")
    what: ClassVar[str] = "a summary of likelihoods"
    way_out: ClassVar[str] = "remove its folder and measure again, or give another --out"
    must_be_sealed: ClassVar[bool] = True

    table: Literal["likelihood.parquet", "likelihood.csv"]
    measured: int = Field(ge=1, lt=1 << 53)
    nonfinite: Count
    bits_per_dim: Number | None
    stderr: StandardError | None = None
    histogram: Histogram | None = None
    most_likely: Ranked | None = None
    least_likely: Ranked | None = None
    data: str
    origin: str
    weights: str
    images_seen: Count | None = None
    images: dict[str, Any]
    noise: str
    provenance: dict[str, Any] = Field(default_factory=dict)


def settings_digest(settings: dict[str, Any]) -> str:
    """Twelve hex digits that distinguish the results of one checkpoint."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def load_result(folder: Path, run: str | None) -> dict[str, Any]:
    """The result in a directory. `run`: the run that it must belong to; None: any.

    Raises DamagedFileError for one that is not valid, and FileNotFoundError where there is none.
    """
    value = read_object(folder / RESULT, ResultFile)
    for field, problem in _contradictions(folder.name, value, run):
        raise DamagedFileError(folder / RESULT, problem, ResultFile.way_out, where=field, what=ResultFile.what)
    return value


def load_work(folder: Path) -> dict[str, Any]:
    """The content of `work.json`; empty if there is none. Raises DamagedFileError."""
    try:
        return read_object(folder / WORK, WorkFile)
    except FileNotFoundError:
        return {}


def _contradictions(folder: str, value: dict[str, Any], run: str | None) -> list[tuple[str, str]]:
    """Contradictions within a result, or to its run or directory, as (field, problem)."""
    name, digest = value["name"], value["settings_hash"]
    found = []
    if run is not None and value["run"] != run:
        found.append(("run", f"it belongs to the run {value['run']}, and this is {run}"))
    if name != folder:
        found.append(("name", f"it names {name!r}, and is in {folder!r}"))
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
        found.append(("name", f"{name!r} does not match its weights and settings, unlike {' or '.join(sorted(names))}"))
    if value["num_samples"] != value["samples"]["used"] or value["nonfinite"] != value["samples"]["nonfinite"]:
        found.append(("num_samples", "it contradicts the field samples"))
    return found
