"""A cluster's profile: what its Slurm needs to know about a job, in one YAML file."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.submission.sbatch_options import check_sbatch
from tarflow.cluster.submission.times import LONGEST_DAYS, minutes
from tarflow.settings import at_home
from tarflow.trainer.config.plain_yaml import in_words, parse_yaml, yaml_text
from tarflow.trainer.errors import TrainerError


class ClusterProfile(BaseModel):
    """How to request jobs on a cluster. Every field has an effect; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    partition: str | None = Field(None, description="partition(s) to run in")
    account: str | None = Field(None, description="account to charge")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="node features required")
    exclude: str | None = Field(None, description="nodes to exclude")
    gpus: int = Field(0, ge=0, le=1024, description="GPUs per node")
    cpus: int | None = Field(None, gt=0, le=1 << 16, description="CPUs per process")
    mem: str | None = Field(None, pattern=r"^[0-9]{1,9}[KMGT]?B?$", description="memory per node, e.g. 64G")
    time: int = Field(60, gt=0, le=LONGEST_DAYS * 1440, description="time limit: minutes, H:MM:SS or D-HH:MM:SS")
    signal_before: int = Field(
        120,
        gt=0,
        le=65535,
        description="seconds before the time limit at which the job is signalled to save; longer than a step plus a save",
    )
    setup: tuple[str, ...] = Field((), description="shell lines to run before the job, e.g. module load cuda")
    container: str | None = Field(
        None, description="command that runs python in a container, e.g. apptainer exec --nv IMAGE.sif"
    )
    python: Annotated[str, BeforeValidator(at_home)] | None = Field(
        None, description="Python interpreter to use (default: the one that submits)"
    )
    sbatch: dict[str, str] = Field({}, description="additional sbatch options: name without dashes -> value")
    srun: tuple[str, ...] = Field((), description="additional srun options, with dashes")
    array_parallelism: int = Field(256, gt=0, le=1 << 20, description="elements of a sweep that run at the same time")
    max_restarts: int = Field(100, ge=0, le=10**6, description="restarts after which a job is not requeued")
    max_no_progress: int = Field(
        3, ge=0, le=10**6, description="consecutive restarts without a newer checkpoint after which it is not requeued"
    )
    restarts_in_place: int = Field(
        0,
        ge=0,
        le=1000,
        description="restarts after a failed process within the same allocation, before the job is requeued",
    )
    preflight: Literal["off", "files", "full"] = Field(
        "full",
        description="checks before the first step: files = the run directory and clocks; full = also GPUs and an all-reduce",
    )
    evaluation: dict[str, Any] = Field(
        {},
        description="settings that replace these for the job of an evaluation, e.g. gpus: 2 (default with --evaluate: one GPU, "
        "its share)",
    )
    min_free_gb: float = Field(
        1.0, ge=0, le=1e9, description="free space in GB that the run directory must have at a start"
    )
    preflight_timeout: int = Field(
        180,
        ge=10,
        le=86400,
        description="seconds within which all ranks must have met and summed a number in the check of preflight: full",
    )

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, value: Any) -> int:
        return minutes(value)

    @field_validator("*", mode="after")
    @classmethod
    def _one_line_each(cls, value: Any, info: ValidationInfo) -> Any:
        """No value may start a new line in the batch script, except in `setup`, which is lines."""
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

    @model_validator(mode="after")
    def _evaluation_fits(self) -> "ClusterProfile":
        if unknown := set(self.evaluation) & {"evaluation"} | self.evaluation.keys() - type(self).model_fields.keys():
            name = sorted(unknown)[0]
            near = difflib.get_close_matches(name, list(type(self).model_fields), n=1, cutoff=0.5)
            raise ValueError(f"unknown setting {name}" + (f"; did you mean {near[0]}?" if near else ""))
        if self.evaluation:
            try:
                self.for_evaluation(1)
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(f"{first['loc'][0]}={first['input']!r}: {first['msg']}") from None
        return self

    @property
    def gpu_options(self) -> list[str]:
        """Entries of `sbatch` that ask for GPUs."""
        return [k for k, v in self.sbatch.items() if k.startswith("gpu") or (k == "gres" and v.startswith("gpu"))]

    def for_evaluation(self, processes: int) -> "ClusterProfile":
        """A small share of a node that `processes` train on, changed by `evaluation`.

        One GPU if there are any, and the part of the memory that as many processes have; never a whole node.
        """
        kept = {name: value for name, value in self.sbatch.items() if name != "exclusive"}
        small = self.model_dump() | {"gpus": min(self.gpus, 1), "sbatch": kept}
        wanted = type(self).model_validate(small | self.evaluation | {"evaluation": {}})
        match = re.fullmatch(r"(\d+)([KMGT]?B?)", self.mem or "")
        if "mem" in self.evaluation or not match:
            return wanted
        parts = min(max(wanted.gpus, 1), processes)
        return wanted.model_copy(update={"mem": f"{-(-int(match[1]) * parts // processes)}{match[2]}"})

    def of_evaluation(self, typed: Iterable[str] = ()) -> "ClusterProfile":
        """What a profile that was given for an evaluation asks for: `evaluation` where it is set, otherwise all of it.

        `typed`: settings that the command line replaced, which go before `evaluation`.
        """
        if not self.evaluation:
            return self
        kept = {name: value for name, value in self.evaluation.items() if name not in typed}
        return self.model_copy(update={"evaluation": kept}).for_evaluation(max(self.gpus, 1))

    def size(self) -> str:
        """The resources of a job on one node, in words."""
        parts = ["1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs"] if self.gpus else ["no GPU"]
        parts += [f"{self.cpus * max(self.gpus, 1)} CPUs"] if self.cpus else []
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
            # All scalars as text: YAML reads 72:00:00 as the number 259200.
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
    check_sbatch(dict(profile.evaluation.get("sbatch", {})), f"{source}: evaluation")
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
    error = item.get("ctx", {}).get("error")
    if isinstance(error, ClusterError):  # it names the setting itself
        return f"{source}: {error}"
    return f"{source}: {key}={item['input']!r}: {error or item['msg']}"
