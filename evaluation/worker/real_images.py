"""The real images that samples are held against: feature network, training images, their statistics.

All checkpoints and all variants of a run share them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from tarflow.evaluation.image_set import ImageSet
from tarflow.evaluation.networks.features import Features
from tarflow.evaluation.worker.recipe import EvaluationSettings
from tarflow.evaluation.worker.reference import (
    Reference,
    cache_path,
    full_provenance,
    load_reference,
    reference_statistics,
)
from tarflow.records import DamagedFileError
from tarflow.trainer.config.schema import Config


@dataclass
class RealImages:
    """Made on first use and kept."""

    evals: Path  # where statistics are stored
    config: Config
    settings: EvaluationSettings
    device: torch.device
    path: Path | None = None  # stored statistics to use; None = computed once from data.train
    say: Callable[[str], None] = print

    @cached_property
    def features(self) -> Features:
        return Features(self.settings.features, self.device, self.settings.features_file)

    def images(self, limit: int) -> ImageSet:
        """Training images; `limit` of them, spread evenly (0 = all)."""
        return ImageSet(self.config.data, self.config.model, limit)

    @cached_property
    def reference(self) -> Reference:
        """Reference statistics: from the file given, from beside the data, or of this run; made if there are none."""
        images = self.images(self.settings.reference_images)
        provenance = full_provenance(images.provenance(), self.features)
        if self.path is not None:
            return self._noted(load_reference(self.path, provenance, dim=self.features.dim))
        beside = cache_path(Path(images.data.train), provenance)  # where `tarflow reference` leaves them
        if beside.is_file():
            try:
                return self._noted(load_reference(beside, provenance, dim=self.features.dim))
            except DamagedFileError as error:
                self.say(f"{beside} is not used, it is damaged: {error.problem} (`tarflow reference` makes it anew)")
        path = cache_path(self.evals, provenance)
        return self._noted(reference_statistics(path, images, self.features, self.config.evaluation.lease_s, self.say))

    def _noted(self, reference: Reference) -> Reference:
        if not reference.checked:
            self.say(
                f"note: {reference.path} carries no checksum: whether its bytes are as they were written is not known"
            )
        return reference
