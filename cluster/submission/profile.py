"""A cluster's profile: what a site wants to know about a job, in one YAML file, typed (contract 10)."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.submission.sbatch_options import check_sbatch
from tarflow.cluster.submission.times import LONGEST_DAYS, minutes
from tarflow.settings import at_home
from tarflow.trainer.config.plain_yaml import in_words, parse_yaml, yaml_text
from tarflow.trainer.errors import TrainerError


class ClusterProfile(BaseModel):
    """How jobs are asked for on a cluster. Every field has an effect; an unknown one is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    partition: str | None = Field(None, description="partition(s) to run in")
    account: str | None = Field(None, description="account that pays")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features a node must have")
    exclude: str | None = Field(None, description="nodes never to use")
    gpus: int = Field(0, ge=0, le=1024, description="GPUs per node")
    cpus: int | None = Field(None, gt=0, le=1 << 16, description="CPUs per process")
    mem: str | None = Field(None, pattern=r"^[0-9]{1,9}[KMGT]?B?$", description="memory per node, e.g. 64G")
    time: int = Field(60, gt=0, le=LONGEST_DAYS * 1440, description="time limit: minutes, H:MM:SS or D-HH:MM:SS")
    signal_before: int = Field(
        120, gt=0, le=65535, description="seconds before the limit at which the job is told to save"
    )
    setup: tuple[str, ...] = Field((), description="lines of the batch script before the job, e.g. module load cuda")
    container: str | None = Field(
        None, description="command that runs python in a container, e.g. apptainer exec --nv IMAGE.sif"
    )
    python: Annotated[str, BeforeValidator(at_home)] | None = Field(
        None, description="python to run (default: the one that submits)"
    )
    sbatch: dict[str, str] = Field({}, description="further options of sbatch: name without dashes -> value")
    srun: tuple[str, ...] = Field((), description="further options of srun, with dashes")
    array_parallelism: int = Field(256, gt=0, le=1 << 20, description="elements of a sweep that run at once")
    max_restarts: int = Field(100, ge=0, le=10**6, description="restarts at which a chain of jobs stops")
    max_no_progress: int = Field(3, ge=0, le=10**6, description="restarts without a newer checkpoint at which it stops")
    restarts_in_place: int = Field(
        0,
        ge=0,
        le=1000,
        description="restarts after a failed process that keep the allocation, before the job is requeued",
    )
    preflight: Literal["off", "files", "full"] = Field(
        "full", description="checks before the first step: files = the run directory; full = also devices, all-reduce"
    )
    min_free_gb: float = Field(
        1.0, ge=0, le=1e9, description="free space in the run directory below which no job starts"
    )

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, value: Any) -> int:
        return minutes(value)

    @field_validator("*", mode="after")
    @classmethod
    def _one_line_each(cls, value: Any, info: ValidationInfo) -> Any:
        """What goes into the batch script cannot begin a line there; `setup` is lines."""
        texts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        for text in texts:
            bare = str(text).replace("\t", " ").replace("\n", " " if info.field_name == "setup" else "\n")
            if not bare.isprintable():
                raise ValueError(f"{text!r} holds a line break or another invisible character")
        if info.field_name == "setup" and any(
            line.startswith("#SBATCH") for text in texts for line in text.splitlines()
        ):
            raise ValueError("options of sbatch go into `sbatch`, not into `setup`")
        return value

    @property
    def gpu_options(self) -> list[str]:
        """Entries of `sbatch` that ask for GPUs."""
        return [k for k, v in self.sbatch.items() if k.startswith("gpu") or (k == "gres" and v.startswith("gpu"))]

    def for_one_process(self, processes: int) -> "ClusterProfile":
        """A share of it: one GPU, if it has any, and one process's part of the memory, of so many on a node."""
        match = re.fullmatch(r"(\d+)([KMGT]?B?)", self.mem or "")
        mem = f"{-(-int(match[1]) // processes)}{match[2]}" if match else None
        return self.model_copy(update={"gpus": min(self.gpus, 1), "mem": mem})

    def size(self) -> str:
        """What a process of it takes, in words."""
        parts = ["1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs"] if self.gpus else ["no GPU"]
        parts += [f"{self.cpus} CPUs"] if self.cpus else []
        parts += [f"{self.mem} of memory"] if self.mem else []
        parts += ["a whole node (sbatch.exclusive)"] if "exclusive" in self.sbatch else []
        return ", ".join(parts)


def load_profile(path: Path | None, changes: dict[str, Any] | None = None) -> ClusterProfile:
    """A profile from its file (None: the defaults), with some fields replaced."""
    tree: Any = {}
    if path is not None:
        if not path.is_file():
            raise ClusterError(
                f"no profile at {path}; configs/slurm/example.yaml is one to copy, docs/slurm.md has every setting"
            )
        try:
            # All scalars as text: YAML would read 72:00:00 as the number 259200 (case C01).
            tree = parse_yaml(yaml_text(path), str(path)) or {}
        except TrainerError as error:
            raise ClusterError(str(error)) from None
        if not isinstance(tree, dict):
            raise ClusterError(f"{path} must hold settings such as `partition: gpu`, not {in_words(tree)}")
    tree = {k: None if v in ("", "~", "null") else v for k, v in tree.items()} | (changes or {})
    source = str(path) if path else "profile"
    try:
        profile = ClusterProfile.model_validate(tree)
    except ValidationError as error:
        typed = {key: f"--{key}" for key in changes or {}}
        raise ClusterError("\n".join(_explain(item, source, typed) for item in error.errors()[:20])) from None
    check_sbatch(profile.sbatch, source)
    return profile


def _explain(item: Any, source: str, typed: Mapping[str, str]) -> str:
    """One of pydantic's errors. `typed`: setting -> the option that it came from, instead of the file."""
    key = ".".join(str(part) for part in item["loc"])
    source = typed.get(key, source)
    if item["type"] == "extra_forbidden":
        known = list(ClusterProfile.model_fields)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return f"{source}: unknown setting {key}; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{source}: {message}" if message.startswith(key) else f"{source}: {key}={item['input']!r}: {message}"
