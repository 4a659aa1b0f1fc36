"""Where weights come from: how they were trained and how they are meant to be sampled. Travels inside weights files."""

from typing import Any, Literal

from pydantic import Field

from tarflow.settings import Section


class Provenance(Section):
    """What is known of weights beyond the model's shape. None: not known, and then nobody assumes it."""

    weights: str | None = Field(None, description="which set of a checkpoint: raw, ema-0.050, ...")
    ema_relative_std: float | None = Field(None, ge=0, description="width of a power-function average")
    step: int | None = Field(None, ge=0, description="optimizer steps behind the weights")
    images_seen: int | None = Field(None, ge=0, description="images behind the weights")
    run: str | None = Field(None, description="identity of the run")
    noise: Literal["gaussian", "uniform"] | None = Field(None, description="noise that was trained on")
    noise_std: float | None = Field(None, ge=0, allow_inf_nan=False, description="of Gaussian noise, in model range")
    label_dropout: float | None = Field(None, ge=0, le=1, description="share of steps without a label")
    classes: tuple[str, ...] | None = Field(None, description="names of the classes, by number")
    sampling: dict[str, Any] | None = Field(None, description="the run's sampling settings")
    code: dict[str, Any] | None = Field(None, description="version and commit of the code that trained")

    def describe(self) -> dict[str, Any]:
        """What is known, as plain values; the sampling settings apart, which a result states as they were used."""
        return self.model_dump(mode="json", exclude={"sampling"}, exclude_none=True)

    def __str__(self) -> str:
        """In a few words, for the terminal."""
        what = f"weights {self.weights}" if self.weights else "weights"
        if self.step is not None:
            what += f" of step {self.step}"
        if self.images_seen is not None:
            what += f" ({self.images_seen:,} images)"
        if self.noise is None:
            return f"{what}; the noise that they were trained on is not known"
        noise = (
            "uniform noise" if self.noise == "uniform" else f"Gaussian noise of standard deviation {self.noise_std:g}"
        )
        dropout = "" if self.label_dropout is None else f", label dropout {self.label_dropout:g}"
        return f"{what}, trained on {noise}{dropout}"
