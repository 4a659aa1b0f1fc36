"""The same samples at several temperatures, one row of a grid for each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tarflow.evaluation.batches import Batches
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.models.flow import TarFlow
from tarflow.models.sampling.settings import SamplingSettings

MOST = 100


def parse_temperatures(text: str) -> tuple[float, ...]:
    """`0.8` or `0.6,0.8,1`. Raises EvaluationError for what is not a temperature, and for one given twice."""
    bounds = SamplingSettings.model_fields["temperature"].metadata
    low, high = (getattr(bound, name) for bound, name in zip(bounds, ("ge", "le")))
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise EvaluationError(f"--temperature {text!r} is not a number, nor numbers between commas") from None
    for value in found:
        if not low <= value <= high:  # NaN, too
            raise EvaluationError(f"--temperature {value:g} is out of bounds: it may be {low:g} to {high:g}")
    if len(set(found)) < len(found) or len(found) > MOST:
        raise EvaluationError(f"--temperature {text}: give at most {MOST} different values")
    return found


class TemperatureSampler(Sampler):
    """Sample i is number i % columns at temperature i // columns."""

    def __init__(
        self,
        model: TarFlow,
        sampling: ResolvedSampling,
        temperatures: Sequence[float],
        columns: int,
        batches: Batches | None = None,
    ) -> None:
        super().__init__(model, sampling.with_changes(temperature=1.0), batches)
        self.temperatures, self.columns = temperatures, columns

    def label_of(self, index: int) -> int:
        """That of its number."""
        return super().label_of(index % self.columns)

    def noise(self, indices: Sequence[int]) -> Tensor:
        """[n, T, D]."""
        scale = torch.tensor([self.temperatures[index // self.columns] for index in indices])
        return super().noise([index % self.columns for index in indices]) * scale[:, None, None]
