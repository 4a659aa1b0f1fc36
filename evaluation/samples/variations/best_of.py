"""Of several candidates for each sample, the one that the flow gives the highest likelihood."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tarflow.evaluation.batches import LIKELIHOOD, Batches
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw import Drawn, Sampler
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.models.cost import likelihood_bytes
from tarflow.models.float32 import TRUE_FLOAT32, products
from tarflow.models.flow import TarFlow
from tarflow.models.likelihood import bits_per_dim

MOST_CANDIDATES = 10_000


class BestSampler(Sampler):
    """Sample i is the best of `candidates`, of which number 0 is what `Sampler` draws for i. All have its label.

    What counts is log p(x | label) of the unguided flow in float32, of the sample as it was drawn, before denoising. The one
    that is chosen is drawn again, with everything that a sample has.
    """

    def __init__(
        self, model: TarFlow, sampling: ResolvedSampling, candidates: int, batches: Batches | None = None
    ) -> None:
        super().__init__(model, sampling, batches)
        self.candidates = candidates
        self.chosen: dict[int, tuple[int, float]] = {}  # sample -> (candidate, its bits per dimension)

    def record(self, indices: Sequence[int]) -> dict[int, dict[str, float | None]]:
        """What the settings of samples hold of these: the number of the chosen candidate, and its bits per dimension."""
        known = {index: self.chosen[index] for index in indices if index in self.chosen}
        return {
            index: {"candidate": candidate, "bits_per_dim": bits if math.isfinite(bits) else None}
            for index, (candidate, bits) in known.items()
        }

    def noise(self, indices: Sequence[int]) -> Tensor:
        """[n, T, D] of the chosen candidates; of those that are not chosen yet, of number 0."""
        return torch.cat([self.candidate_noise([index], self.chosen.get(index, (0,))[0]) for index in indices])

    def draw(self, indices: Sequence[int], with_trajectory: bool = False) -> Drawn:
        """The best of these indices, in one batch as far as memory goes."""
        labels = self.labels(indices).to(self.model.var.device) if self.model.config.num_classes else None
        bits = torch.stack([self._bits(indices, labels, candidate) for candidate in range(self.candidates)])
        for index, candidate, least in zip(indices, bits.argmin(0).tolist(), bits.amin(0).tolist()):
            self.chosen[index] = candidate, least  # ties go to the lowest number
        return super().draw(indices, with_trajectory)

    def _bits(self, indices: Sequence[int], labels: Tensor | None, candidate: int) -> Tensor:
        """Bits per dimension [n] of a candidate of each; infinite where the sample or its likelihood is not finite."""
        noise = self.candidate_noise(indices, candidate).to(self.model.var.device)
        nobody = torch.zeros(len(indices), dtype=torch.bool)
        with products(self.sampling.matmul_precision):
            images = self._sampled(self._fast, noise, labels, nobody).images

        @torch.inference_mode()
        def measure(part: slice) -> Tensor:
            t, some = self.sampling.settings.noise_level, images[part]
            noise = None if t is None else torch.full((len(some),), t, device=some.device)
            return bits_per_dim(self.model, some, None if labels is None else labels[part], noise).double().cpu()

        with products(TRUE_FLOAT32):
            found = torch.cat(self.batches.run(LIKELIHOOD, len(indices), measure, likelihood_bytes(self.model.config)))
        return found.where(torch.isfinite(found), torch.inf)


def choose_best_of(
    model: TarFlow, sampling: ResolvedSampling, number: int, batches: Batches, option: str, cold: str
) -> Sampler:
    """The sampler of the best of `number` candidates, which of one is the plain one.

    `option` with the number in it and `cold`, for temperature 0, are what the user calls them. Raises EvaluationError.
    """
    if not 1 <= number <= MOST_CANDIDATES:
        raise EvaluationError(f"{option.format(number)} is out of bounds: it may be 1 to {MOST_CANDIDATES:,}")
    if number == 1:
        return Sampler(model, sampling, batches)
    if sampling.settings.temperature == 0:
        raise EvaluationError(
            f"{option.format(number)} chooses among samples, and at {cold} all of them are one: give one of the two"
        )
    return BestSampler(model, sampling, number, batches)
