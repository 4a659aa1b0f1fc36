"""Where weights come from: how they were trained and how to sample from them. Stored inside weights files."""

import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tarflow.settings import Section

# Of noise of many levels; here, where no torch is loaded, for the settings.
NoiseDistribution = Literal["uniform", "squared_uniform", "log_normal"]
Weighting = Literal["none", "level", "level_squared"]

MOST = (1 << 63) - 1
_DEEPEST = 8  # levels of nesting in `sampling` and `code`


def _plain(value: Any, depth: int = 0) -> Any:
    """Require that every text in a value can be shown on one line: no control characters, valid UTF-8."""
    if depth > _DEEPEST:
        raise ValueError("it is nested too deeply")
    if isinstance(value, str) and any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value):
        raise ValueError(f"{value[:80]!a} holds a control character, such as a line break")
    if isinstance(value, dict):
        value = {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        for item in value:
            _plain(item, depth + 1)
    return value


Word = Annotated[
    str, Field(min_length=1, max_length=255), AfterValidator(_plain)
]  # as long as the name of a class may be
Facts = Annotated[dict[str, Any], Field(max_length=1000), AfterValidator(_plain)]


class Provenance(Section):
    """What is known of weights besides the architecture. None means unknown: nothing is assumed then."""

    weights: Word | None = Field(None, description="which weights of a checkpoint: raw, ema-0.050, ...")
    ema_relative_std: float | None = Field(None, ge=0, le=1, description="relative width of the power-function average")
    step: int | None = Field(None, ge=0, le=MOST, description="optimizer steps taken")
    images_seen: int | None = Field(None, ge=0, le=MOST, description="images trained on")
    run: Word | None = Field(None, description="id of the training run")
    noise: Literal["gaussian", "uniform"] | None = Field(None, description="training noise")
    noise_std: float | None = Field(None, ge=0, description="standard deviation of gaussian noise, in model range")
    noise_range: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = Field(
        None, description="lowest and highest standard deviation of the noise, of a model that is told it"
    )
    likelihood_noise: float | None = Field(
        None, gt=0, description="the standard deviation of these at which the run measures likelihoods"
    )
    label_dropout: float | None = Field(None, ge=0, le=1, description="probability of training without the label")
    classes: tuple[Word, ...] | None = Field(None, description="class names, by label")
    sampling: Facts | None = Field(None, description="the run's sampling settings")
    code: Facts | None = Field(None, description="version and commit of the training code")

    @model_validator(mode="after")
    def _noise_fits(self) -> "Provenance":
        if (self.noise == "gaussian" and self.noise_std is None) or (self.noise == "uniform" and self.noise_std):
            raise ValueError(f"noise={self.noise} does not go with noise_std={self.noise_std}")
        if self.noise_range is not None and (self.noise != "gaussian" or self.noise_std):
            raise ValueError(
                f"noise_range={list(self.noise_range)} does not go with noise={self.noise}, {self.noise_std}"
            )
        if self.noise_range is not None and self.noise_range[0] > self.noise_range[1]:
            raise ValueError(f"noise_range={list(self.noise_range)} must begin with the lower level")
        if self.likelihood_noise is not None and self.noise_range is None:
            raise ValueError(f"likelihood_noise={self.likelihood_noise:g} does not go without noise_range")
        return self

    def describe(self) -> dict[str, Any]:
        """Plain values of what is known, without the sampling settings: a result records the ones that it used."""
        return self.model_dump(mode="json", exclude={"sampling"}, exclude_none=True)

    def __str__(self) -> str:
        """One line for the terminal."""
        what = f"weights {self.weights}" if self.weights else "weights"
        if self.step is not None:
            what += f" of step {self.step}"
        if self.images_seen is not None:
            what += f" ({self.images_seen:,} images)"
        if self.noise is None:
            return f"{what}; their training noise is not known"
        dropout = "" if self.label_dropout is None else f", label dropout {self.label_dropout:g}"
        return f"{what}, trained on {self.noise_words}{dropout}"

    @property
    def noise_words(self) -> str:
        """The noise of training, which is known, in words."""
        if self.noise == "uniform":
            return "uniform noise"
        if self.noise_range is not None:
            return "Gaussian noise of standard deviations {:g} to {:g}, told to the model".format(*self.noise_range)
        return f"Gaussian noise of standard deviation {self.noise_std:g}"
