"""Section `sampling` of a run's configuration."""

from typing import Literal

from pydantic import Field

from tarflow.models.sampling.guidance import Guidance
from tarflow.settings import MOST_SEED, Count, Section


class SamplingSettings(Section):
    """How images are drawn from the model: all of it goes into every result."""

    guidance: float = Field(0.0, ge=0, le=1e4, description="weight w of a = a_c + w (a_c - a_u); 0 = none")
    guide: Literal["a", "b", "ab"] = Field("ab", description="what is guided: log-scale a, shift b")
    attn_temp: float = Field(1.0, ge=1e-4, le=1e4, description="attention temperature of the unguided half")
    annealed: bool = Field(True, description="let the weight grow over the tokens")
    denoise: float | None = Field(
        None,
        ge=0,
        le=1e4,
        description="multiplier of the score-based denoising step; 0 = none, null = 1 after gaussian noise",
    )
    batch_size: Count = Field(64, gt=0, le=1 << 20, description="images drawn at once; does not change them")
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the network's products while sampling"
    )
    seed: Count = Field(0, ge=0, le=MOST_SEED, description="key of the noise: image i depends on (seed, i) alone")
    labels: Literal["balanced", "training"] = Field(
        "balanced", description="classes of the samples: each as often, or as often as in data.train"
    )

    def make_guidance(self) -> Guidance:
        """The rule that these settings describe. Raises ModelError for values out of range."""
        return Guidance(self.guidance, self.guide, self.attn_temp, self.annealed)

    def guidance_problem(self, labelled: bool, label_dropout: float | None) -> str | None:
        """Why this guidance cannot mean anything, or None. `label_dropout` of the training; None: not known.

        The unguided half sees no label, or attention logits divided by `attn_temp`. A class-conditional model that never
        trained without labels has no such half, and without labels a temperature of 1 makes both halves the same.
        """
        if self.guidance == 0:
            return None
        if labelled and label_dropout == 0:
            return (
                f"sampling.guidance={self.guidance} needs a model that was trained without labels now and then, but "
                "train.label_dropout=0: its answer to `no label` was never trained. Set sampling.guidance=0, or train with "
                "train.label_dropout=0.1"
            )
        if not labelled and self.attn_temp == 1:
            return (
                f"sampling.guidance={self.guidance} has no effect without labels while sampling.attn_temp=1: guided "
                "and unguided network are the same. Set sampling.attn_temp (for example 0.3), or sampling.guidance=0"
            )
        return None
