"""Section `ema`: which averages of the weights a run keeps, and their names."""

from pydantic import Field, model_validator

from tarflow.settings import MOST_IMAGES, Count, Section

MOST_AVERAGES = 16  # of each kind: each is as large as the weights


def power_name(relative_std: float) -> str:
    """Name of a power-function average in checkpoints, settings and commands."""
    return f"ema-{relative_std:.3f}"


def decay_name(decay: float) -> str:
    """Name of an exponential average."""
    return f"ema-decay-{decay:g}"


class EMAConfig(Section):
    """Averages of the weights: power-function (arXiv 2312.02696) and exponential. They are sharded like the weights."""

    relative_stds: tuple[float, ...] = Field(
        (0.05, 0.1),
        max_length=MOST_AVERAGES,
        description="width of each power-function average, relative to the length of the run so far; each "
        "costs the memory of the weights. Wider averages suit long runs",
    )
    decays: tuple[float, ...] = Field(
        (), max_length=MOST_AVERAGES, description="decay per step of additional exponential averages, e.g. [0.9999]"
    )
    snapshot_every_images: Count = Field(
        0,
        ge=0,
        le=MOST_IMAGES,
        description="images between snapshots of the power-function averages, from which `tarflow ema` "
        "computes any width after training; each comes with a checkpoint and is kept forever. 0 = "
        "none",
    )

    @model_validator(mode="after")
    def _distinct(self) -> "EMAConfig":
        for std in self.relative_stds:
            if not 0 < std < 0.28:
                raise ValueError(f"ema.relative_stds: a width lies between 0 and 0.28, got {std}")
        if len(set(map(power_name, self.relative_stds))) < len(self.relative_stds):
            raise ValueError(
                f"ema.relative_stds: widths must differ in the first three decimals, got {self.relative_stds}"
            )
        for decay in self.decays:
            if not 0 < decay < 1:
                raise ValueError(f"ema.decays: a decay lies between 0 and 1, got {decay}")
        if len(set(map(decay_name, self.decays))) < len(self.decays):
            raise ValueError(f"ema.decays: decays must differ in the first six digits, got {self.decays}")
        if self.snapshot_every_images and not self.relative_stds:
            raise ValueError("ema.snapshot_every_images needs ema.relative_stds: only power averages can be refitted")
        return self

    @property
    def names(self) -> list[str]:
        """Names of all averages: exponential, then power-function, each in the order listed."""
        return [*map(decay_name, self.decays), *map(power_name, self.relative_stds)]

    @property
    def preferred(self) -> str:
        """The weights that `auto` means: the last average, or the raw weights without any."""
        return self.names[-1] if self.names else "raw"
