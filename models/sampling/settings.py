"""How images are sampled: section `sampling` of a configuration, and what `sample` goes by."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tarflow.settings import MOST_SEED, Count, Section

LEVEL_OF_A_STEP = 0.01  # of noise that one step of iterative denoising takes out by default, as published


class SamplingSettings(Section):
    """How images are sampled: guidance, denoising, dtype, seed and labels. Recorded in every result.

    The formulas of guidance are in `guidance.py`: of the conditional network and the unconditional one, which sees no label
    and divides its attention logits by `attn_temp`.
    """

    guidance: float = Field(0.0, ge=0, le=1e4, description="guidance weight w in a = a_c + w (a_c - a_u); 0 = off")
    guide: Literal["a", "b", "ab"] = Field("ab", description="what guidance acts on: log-scale a, shift b, or both")
    guidance_form: Literal["linear", "closed", "sigma"] = Field(
        "linear",
        description="formula of guidance: the paper's linear rule; the closed form of the guided Gaussian, which stays "
        "stable at large w; or linear in the scale exp(a) itself instead of its logarithm, as iterative models were published",
    )
    guide_blocks: tuple[Annotated[Count, Field(ge=-(1 << 10), lt=1 << 10)], ...] = Field(
        (),
        max_length=1 << 10,
        description="flow blocks that are guided, counted from 0 in the forward direction, negative from the end; -1 is the "
        "last, which is sampled first. Empty = all",
    )
    attn_temp: float = Field(1.0, ge=1e-4, le=1e4, description="attention temperature of the unconditional half")
    annealed: bool = Field(
        True, description="scale the guidance weight of token i by i / (T - 1): 0 at the first token, w at the last"
    )
    temperature: float = Field(
        1.0,
        ge=0,
        le=10,
        description="t: the latents are drawn from N(0, t^2 times the prior's variance); below 1 likelier and plainer images, "
        "0 the one image of the prior's mean",
    )
    denoise: float | None = Field(
        None,
        ge=0,
        le=1e4,
        description="multiplier of the score-based denoising step; 0 = off, null = 1 if trained with gaussian noise",
    )
    noise_level: float | None = Field(
        None,
        gt=0,
        le=100,
        description="t1, of a model with noise_conditioning: the noise level at which the flow is inverted, and from which its "
        "samples are denoised step by step; null = the upper end of train.noise_range",
    )
    denoise_to: float | None = Field(
        None,
        gt=0,
        le=100,
        description="t0, the last noise level before 0 in iterative denoising; null = the lower end of train.noise_range",
    )
    denoise_steps: Count | None = Field(
        None,
        gt=0,
        le=10_000,
        description="steps of iterative denoising, each a forward and a backward pass; null = one for every 0.01 of t1",
    )
    denoise_schedule: Literal["linear", "geometric"] = Field(
        "linear",
        description="noise levels of iterative denoising from t1 to t0: at equal distances, or in equal ratios",
    )
    denoise_stochastic: bool = Field(
        False,
        description="iterative denoising: draw a part of the noise anew at every step, instead of following the ODE; the draws "
        "are keyed by the sample",
    )
    batch_size: Count = Field(64, gt=0, le=1 << 20, description="images per batch; does not change the images")
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the network's parameters and matrix products while sampling"
    )
    method: Literal["sequential", "fixed_point", "auto"] = Field(
        "sequential",
        description="how a block is inverted: token by token; by iterating on many tokens at once; or by the fastest of these, "
        "measured on the first batch, with the compiled engine on a CPU. The images agree within the tolerance",
    )
    tolerance: float = Field(
        1e-4,
        ge=2e-5,
        le=1e-1,
        description="how far the noise that a sample is the exact image of may lie from the noise asked for; what misses it is "
        "sampled again token by token. Below 2e-5 float32 rounds",
    )
    certify_every: Count = Field(
        16,
        ge=0,
        le=1 << 20,
        description="certify every n-th sample also where it was drawn token by token, which costs a pass over it; 1 = all, "
        "0 = none",
    )
    seed: Count = Field(0, ge=0, le=MOST_SEED, description="seed of the noise: image i depends on (seed, i) alone")
    labels: Literal["balanced", "training"] = Field(
        "balanced", description="label distribution of the samples: uniform over the classes, or that of data.train"
    )

    @model_validator(mode="after")
    def _exact(self) -> "SamplingSettings":
        if self.method != "sequential" and self.param_dtype != "float32":
            raise ValueError(
                f"sampling.method={self.method} needs sampling.param_dtype=float32, got {self.param_dtype}: an iteration on a "
                "network that rounds to three digits does not come to rest. Set sampling.method=sequential"
            )
        return self

    @property
    def unsaid(self) -> set[str]:
        """Settings that came after results were first written, where they have their defaults.

        They are left out of what names a result, so that a result of an earlier version keeps its name.
        """
        return {name for name, value in LATER.items() if getattr(self, name) == value}

    def described(self) -> dict[str, Any]:
        """Plain values, with the number of denoising steps resolved; for results and to compare with them."""
        return self.model_dump(mode="json") | ({"denoise_steps": self.steps} if self.steps else {})

    @property
    def guided(self) -> bool:
        """Whether a second, unconditional half is computed at all."""
        return self.guidance > 0

    @property
    def memory(self) -> dict[str, Any]:
        """What the cost model of sampling goes by (`tarflow.models.cost.sampling_bytes`)."""
        return {
            "element": 2 if self.param_dtype == "bfloat16" else 4,
            "guided": self.guided,
            "whole": self.method != "sequential",
            "certified": 1 / self.certify_every if self.certify_every else 0.0,
        }

    @property
    def steps(self) -> int:
        """Steps of iterative denoising; 0 where there is none."""
        if self.noise_level is None or self.denoise == 0:
            return 0
        if self.denoise_to is not None and self.noise_level <= self.denoise_to:
            return 1  # there is no level between
        return self.denoise_steps or max(round(self.noise_level / LEVEL_OF_A_STEP), 1)

    def at_noise(self, bounds: tuple[float, float] | None) -> "SamplingSettings":
        """The settings with what was left to the noise levels (t0, t1) that a model was trained on; None: on one alone."""
        if bounds is None:
            return self
        low, high = bounds
        level = high if self.noise_level is None else self.noise_level
        return self.model_copy(
            update={
                "noise_level": level,
                "denoise_to": min(low, level) if self.denoise_to is None else self.denoise_to,
                "denoise": 1.0 if self.denoise is None else self.denoise,
            }
        )

    def noise_problem(self, conditioned: bool, bounds: tuple[float, float] | None = None) -> str | None:
        """Why these settings do not go with a model, or None. `bounds`: the noise levels it was trained on; None if unknown."""
        if not conditioned:
            for name in ITERATIVE:
                if getattr(self, name) != LATER[name]:
                    return (
                        f"sampling.{name}={getattr(self, name)} needs model.noise_conditioning=true: a model that is told no "
                        "noise level has one step of denoising (sampling.denoise)"
                    )
            return None
        if self.denoise not in (None, 0, 1):
            return (
                f"sampling.denoise={self.denoise:g} needs model.noise_conditioning=false: iterative denoising has steps "
                "(sampling.denoise_steps) instead of a multiplier; 1 = on, 0 = off"
            )
        low, high = bounds or (0.0, math.inf)
        for name in ("noise_level", "denoise_to"):
            level = getattr(self, name)
            if level is not None and not low <= level <= high:
                return (
                    f"sampling.{name}={level:g} lies outside train.noise_range=[{low:g}, {high:g}]: the model was not trained "
                    "at that noise level"
                )
        between = self.denoise_steps != 1 and self.denoise != 0  # one step goes to 0 at once
        if (
            between
            and self.noise_level is not None
            and self.denoise_to is not None
            and self.denoise_to > self.noise_level
        ):
            return (
                f"sampling.denoise_to={self.denoise_to:g} is above sampling.noise_level={self.noise_level:g}: denoising "
                "goes from the latter down to the former"
            )
        return None

    def blocks_problem(self, blocks: int) -> str | None:
        """Why these blocks of a flow of `blocks` blocks cannot be guided, or None."""
        for number in self.guide_blocks:
            if not -blocks <= number < blocks:
                return (
                    f"sampling.guide_blocks={list(self.guide_blocks)} names block {number}, and the model has {blocks} "
                    f"(0..{blocks - 1}, or -1 for the last, which is sampled first)"
                )
        return None

    def guidance_problem(self, labelled: bool, label_dropout: float | None) -> str | None:
        """Why this guidance would be meaningless, or None. `label_dropout` is that of training; None if unknown.

        A class-conditional model that was never trained without labels has no unconditional half, and without labels a
        temperature of 1 makes both halves the same.
        """
        if not self.guided:
            return None
        if labelled and label_dropout == 0:
            return (
                f"sampling.guidance={self.guidance} needs a model trained with label dropout, but train.label_dropout=0: its "
                "`no label` embedding was never trained. Set sampling.guidance=0, or train with train.label_dropout=0.1"
            )
        if not labelled and self.attn_temp == 1:
            return (
                f"sampling.guidance={self.guidance} has no effect without labels while sampling.attn_temp=1: guided "
                "and unguided network are the same. Set sampling.attn_temp (for example 0.3), or sampling.guidance=0"
            )
        return None


# Settings that results of the first versions do not hold, with the values that these were drawn with.
ITERATIVE = ("noise_level", "denoise_to", "denoise_steps", "denoise_schedule", "denoise_stochastic")
_LATER = ("guidance_form", "guide_blocks", "method", "tolerance", "certify_every", "temperature", *ITERATIVE)
LATER = {name: SamplingSettings.model_fields[name].default for name in _LATER}
