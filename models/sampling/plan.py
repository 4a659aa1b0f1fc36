"""Which engine and which path inverts each block. Equal plans give equal samples, whoever draws them."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from tarflow.models.config import TarFlowConfig
from tarflow.models.errors import ModelError
from tarflow.models.sampling.paths import JOINT, WHOLE, Path
from tarflow.models.sampling.settings import SamplingSettings
from tarflow.records import Record

FIRST_WINDOW = 32  # of method=fixed_point in the block that is sampled first, where whole sequences converge slowly
ENGINES = ("eager", "native", "graphed")
KINDS = ("sequential", "window", "whole", "joint")

Seconds = Annotated[float, Field(ge=0, le=1e9)]


class BlockPlan(Record):
    """One block: `engine` is "eager" (torch), "native" (compiled, on the CPU) or "graphed" (CUDA); `width` is a window's."""

    engine: str = "eager"
    path: str = "sequential"
    width: int = Field(0, ge=0, le=1 << 16)
    # What was measured, by candidate such as "native window 32"; nothing depends on it.
    seconds: dict[str, Seconds] = Field(default_factory=dict)
    passes: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)

    @field_validator("engine")
    @classmethod
    def _engine(cls, value: str) -> str:
        if value not in ENGINES:
            raise ValueError(f"{value!r} is not an engine; the engines are {', '.join(ENGINES)}")
        return value

    @field_validator("path")
    @classmethod
    def _path(cls, value: str) -> str:
        if value not in KINDS:
            raise ValueError(f"{value!r} is not a path; the paths are {', '.join(KINDS)}")
        return value

    @property
    def how(self) -> Path:
        """The path, for `paths.follow`."""
        return Path(self.path, self.width)

    @property
    def is_reference(self) -> bool:
        """Whether it is the sequential path in torch, which every other one is held to."""
        return (self.engine, self.path) == ("eager", "sequential")

    def __str__(self) -> str:
        return f"{self.engine} {self.how}"


class SamplingPlan(Record):
    """The plan of a model's blocks, in the flow's forward order, and what it holds for."""

    what: ClassVar[str] = "the plan of sampling"
    way_out: ClassVar[str] = "remove it, and it is measured again"

    blocks: list[BlockPlan] = Field(min_length=1, max_length=1 << 10)
    conditions: dict[str, Any] = Field(default_factory=dict)  # a plan is refused where they differ
    machine: dict[str, Any] = Field(default_factory=dict)  # it was measured on; empty where nothing was

    @model_validator(mode="after")
    def _all_or_none(self) -> "SamplingPlan":
        joint = [block.how == JOINT for block in self.blocks]
        if any(joint) and not all(joint):
            raise ValueError(
                f"block {joint.index(False)} is inverted by itself, and block {joint.index(True)} with all others"
            )
        return self

    @property
    def is_joint(self) -> bool:
        """Whether all blocks are inverted at once."""
        return self.blocks[0].how == JOINT

    def check(self, conditions: dict[str, Any]) -> None:
        """Raise ModelError where the plan was made under other conditions, or is not of as many blocks."""
        if len(self.blocks) != conditions["blocks"]:
            raise ModelError(
                f"the plan of sampling has {len(self.blocks)} blocks, and the model {conditions['blocks']}"
            )
        for key in sorted(self.conditions.keys() | conditions.keys()):
            made, here = self.conditions.get(key), conditions.get(key)
            if made != here:
                raise ModelError(
                    f"the plan of sampling was made for {key} {made!r}, and this is {here!r}: measure it again "
                    "(sampling.method=auto), or set sampling.method=sequential"
                )

    def __str__(self) -> str:
        return ", ".join(f"block {number} {block}" for number, block in reversed(list(enumerate(self.blocks))))


def conditions_of(config: TarFlowConfig, settings: SamplingSettings, weights: str) -> dict[str, Any]:
    """What a plan holds for: the model and its weights (their hash, or "" if unknown), guidance and tolerance."""
    guidance = settings.model_dump(
        mode="json",
        include={"guidance", "guide", "guidance_form", "guide_blocks", "attn_temp", "annealed", "method", "tolerance",
                 "param_dtype"},
    )  # fmt: skip
    level = {} if settings.noise_level is None else {"noise_level": settings.noise_level}
    return {"weights": weights, "tokens": config.num_tokens, "blocks": config.num_blocks} | guidance | level


def plan_without_measuring(config: TarFlowConfig, settings: SamplingSettings, weights: str = "") -> SamplingPlan:
    """The plan of the methods `sequential` and `fixed_point`."""
    blocks = [BlockPlan() for _ in range(config.num_blocks)]
    if settings.method == "fixed_point":
        blocks = [BlockPlan(path=WHOLE.kind) for _ in blocks[:-1]]
        blocks.append(BlockPlan(path="window", width=FIRST_WINDOW))
    assert settings.method != "auto"
    return SamplingPlan(blocks=blocks, conditions=conditions_of(config, settings, weights))
