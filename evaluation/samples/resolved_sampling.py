"""Sampling settings with everything resolved that a configuration leaves to the run and its data."""

import json
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pydantic import ValidationError

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.models.float32 import TRUE_FLOAT32, Precision
from tarflow.models.sampling.settings import SamplingSettings
from tarflow.settings import first_reason
from tarflow.trainer.config.schema import Config


@dataclass(frozen=True, eq=False)
class ResolvedSampling:
    """Everything that determines the image of sample i; recorded in every result.

    Two are equal if they draw the same images: the batch size does not count.
    """

    settings: SamplingSettings = field(default_factory=SamplingSettings)  # with `denoise` a number; None = off
    noise_std: float = 0.0  # of the noise in samples, in model range: that of training, or t1; sets the denoising
    labels: tuple[int, ...] = ()  # sample i has labels[i % len]; empty = balanced over all classes; -1 = no label
    class_counts: tuple[int, ...] = ()  # if `labels` is empty: labels are drawn with these frequencies
    matmul_precision: Precision = TRUE_FLOAT32  # of float32 products while sampling

    @classmethod
    def of_run(cls, config: Config) -> "ResolvedSampling":
        """Resolve the section `sampling` of a run's configuration; label frequencies are counted in data.train."""
        counts: tuple[int, ...] = ()
        if config.sampling.labels == "training" and config.model.num_classes:
            counts = ImageSet(config.data, config.model).class_counts()
        settings = config.resolved_sampling
        precision = config.evaluation.matmul_precision
        return cls(
            settings, settings.noise_level or config.train.noise_std, class_counts=counts, matmul_precision=precision
        )

    def with_changes(self, **changes: Any) -> "ResolvedSampling":
        """A copy with other sampling settings, or other fields of this class (so `labels` is a tuple of labels).

        Raises EvaluationError for values outside their bounds, and TypeError for unknown names.
        """
        own = {f.name: changes.pop(f.name) for f in fields(self) if f.name in changes}
        if unknown := set(changes) - set(SamplingSettings.model_fields):
            raise TypeError(f"no settings of the section sampling: {', '.join(sorted(unknown))}")
        try:
            settings = SamplingSettings.model_validate(self.settings.model_dump() | changes)
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:  # several settings contradict each other
                raise EvaluationError(first_reason(error)) from None
            raise EvaluationError(
                f"sampling.{first['loc'][0]} cannot be {first['input']!r}: {first_reason(error)}"
            ) from None
        if settings.noise_level is not None:
            own["noise_std"] = settings.noise_level
        return replace(self, settings=settings, **own)

    @property
    def denoise_multiplier(self) -> float:
        """Multiplier of the denoising step; 0 = off."""
        return 0.0 if self.settings.denoise is None else self.settings.denoise

    def describe(self) -> dict[str, Any]:
        """Plain values for result files; `labels` is written out."""
        steps = {"denoise_steps"}
        unsaid = {"batch_size"} | (
            self.settings.unsaid - steps if self.settings.steps else self.settings.unsaid | steps
        )
        described = {key: value for key, value in self.settings.described().items() if key not in unsaid}
        described |= {"denoise": self.denoise_multiplier, "noise_std": self.noise_std}
        if (
            self.matmul_precision != TRUE_FLOAT32
        ):  # results of earlier versions were all computed so, and say nothing of it
            described["matmul_precision"] = self.matmul_precision
        if self.labels or not self.class_counts:
            return described | {"labels": list(self.labels) or "balanced: i % num_classes"}
        counts = list(self.class_counts)
        return described | {"labels": "drawn by the frequencies in the training data", "class_counts": counts}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ResolvedSampling) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(json.dumps(self.describe(), sort_keys=True))

    @property
    def balanced(self) -> "ResolvedSampling":
        """A copy with balanced labels, for pictures that show one class per row."""
        return replace(self, labels=(), class_counts=())
