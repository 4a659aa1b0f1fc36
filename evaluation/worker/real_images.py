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
    DamagedReferenceError,
    Reference,
    cache_path,
    full_provenance,
    load_reference,
    reference_statistics,
)
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
            return load_reference(self.path, provenance)
        beside = cache_path(Path(images.data.train), provenance)  # where `tarflow reference` leaves them
        if beside.is_file():
            try:
                return load_reference(beside, provenance)
            except DamagedReferenceError:
                self.say(f"{beside} is cut short or damaged: not used (`tarflow reference` makes it anew)")
        path = cache_path(self.evals, provenance)
        return reference_statistics(path, images, self.features, self.config.evaluation.lease_s, self.say)
