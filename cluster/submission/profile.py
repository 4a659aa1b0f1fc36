"""A cluster's profile: what a site wants to know about a job, in one YAML file, typed (contract 10)."""

import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.submission.times import minutes
from tarflow.trainer.config.plain_yaml import parse_yaml
from tarflow.trainer.errors import TrainerError


class Profile(BaseModel):
    """How jobs are asked for on a cluster. Every field has an effect; an unknown one is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: str | None = Field(None, description="partition(s) to run in")
    account: str | None = Field(None, description="account that pays")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features a node must have")
    exclude: str | None = Field(None, description="nodes never to use")
    gpus: int = Field(0, ge=0, description="GPUs per node")
    cpus: int | None = Field(None, gt=0, description="CPUs per process")
    mem: str | None = Field(None, pattern=r"^\d+[KMGT]?B?$", description="memory per node, e.g. 64G")
    time: int = Field(60, description="time limit: minutes, H:MM:SS or D-HH:MM:SS")
    signal_before: int = Field(
        120, gt=0, le=65535, description="seconds before the limit at which the job is told to save"
    )
    setup: tuple[str, ...] = Field((), description="lines of the batch script before the job, e.g. module load cuda")
    container: str | None = Field(
        None, description="command that runs python in a container, e.g. apptainer exec --nv IMAGE.sif"
    )
    python: str | None = Field(None, description="python to run (default: the one that submits)")
    sbatch: dict[str, str] = Field({}, description="further options of sbatch: name without dashes -> value")
    srun: tuple[str, ...] = Field((), description="further options of srun, with dashes")
    array_parallelism: int = Field(256, gt=0, description="elements of a sweep that run at once")
    max_restarts: int = Field(100, ge=0, description="restarts at which a chain of jobs stops")
    max_no_progress: int = Field(3, ge=0, description="restarts without a newer checkpoint at which it stops")
    restarts_in_place: int = Field(
        0, ge=0, description="restarts after a failed process that keep the allocation, before the job is requeued"
    )
    preflight: Literal["off", "files", "full"] = Field(
        "full", description="checks before the first step: files = the run directory; full = also devices, all-reduce"
    )
    min_free_gb: float = Field(1.0, ge=0, description="free space in the run directory below which no job starts")

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, value: Any) -> int:
        return minutes(value)


def load_profile(path: Path | None, changes: dict[str, Any] | None = None) -> Profile:
    """A profile from its file (None: the defaults), with some fields replaced."""
    tree: Any = {}
    if path is not None:
        if not path.is_file():
            raise ClusterError(f"no profile at {path}; copy one of configs/ or see docs/slurm.md")
        try:
            # All scalars as text: YAML would read 72:00:00 as the number 259200 (case C01).
            tree = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
        except UnicodeDecodeError as error:
            raise ClusterError(f"{path} is not readable YAML: {error}") from None
        except TrainerError as error:
            raise ClusterError(str(error)) from None
        if not isinstance(tree, dict):
            raise ClusterError(f"{path} must hold settings such as `partition: gpu`, not {type(tree).__name__}")
    tree = {k: None if v in ("", "~", "null") else v for k, v in tree.items()} | (changes or {})
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        source = str(path) if path else "profile"
        raise ClusterError("\n".join(_explain(item, source) for item in error.errors())) from None


def _explain(item: Any, source: str) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = list(Profile.model_fields)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return f"{source}: unknown setting {key}; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{source}: {message}" if message.startswith(key) else f"{source}: {key}={item['input']!r}: {message}"
