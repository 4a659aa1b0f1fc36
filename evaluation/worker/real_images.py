"""The reference images: feature network, training images, their statistics.

All checkpoints and all variants of a run share them.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tarflow.evaluation.batches import NOTE, Batches
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.log import Log
from tarflow.evaluation.networks.features import Features
from tarflow.evaluation.references.compute import reference_statistics
from tarflow.evaluation.references.images_inside import reference_rows
from tarflow.evaluation.references.reference import Provenance, Reference, cache_path, full_provenance, load_reference
from tarflow.evaluation.worker.recipe import EvaluationSettings
from tarflow.records import DamagedFileError
from tarflow.trainer.config.schema import Config


@dataclass
class RealImages:
    """Loaded or computed on first use, then kept."""

    evals: Path  # where new statistics are stored
    config: Config
    settings: EvaluationSettings
    device: torch.device
    path: Path | None = None  # stored statistics to use; None = computed once from data.train
    log: Log = print

    @cached_property
    def features(self) -> Features:
        """The feature network."""
        features = Features(self.settings.features, self.device, self.settings.features_file)
        features.batches = self.batches
        return features

    @cached_property
    def batches(self) -> Batches:
        """How many images each stage takes at a time, on this process's device."""
        return Batches(self.device, self.log, note=self.evals.parent / NOTE)

    def images(self, limit: int) -> ImageSet:
        """Training images; `limit` of them, spread evenly (0 = all)."""
        return ImageSet(self.config.data, self.config.model, limit)

    @cached_property
    def reference(self) -> Reference:
        """Reference statistics: from the given file, from beside the data, or of this run; computed if there are none."""
        images = self.images(self.settings.reference_images)
        provenance = full_provenance(images.provenance(), self.features)
        if self.path is not None:
            return self._with_note(self._load(self.path, provenance))
        beside = cache_path(Path(images.data.train), provenance)  # where `tarflow reference` writes them
        if beside.is_file():
            try:
                return self._with_note(self._load(beside, provenance))
            except DamagedFileError as error:
                self.log(f"{beside} is damaged and not used: {error.problem} (`tarflow reference` rebuilds it)")
        path = cache_path(self.evals, provenance)
        return self._with_note(
            reference_statistics(path, images, self.features, self.config.evaluation.lease_s, self.log)
        )

    @cached_property
    def rows(self) -> Tensor:
        """Features [m, d] of single reference images, possibly none; only the worker that measures a result needs them."""
        return reference_rows(self.reference, self.features, self.log)

    def _load(self, path: Path, provenance: Provenance) -> Reference:
        return load_reference(path, provenance, dim=self.features.dim, spatial_dim=self.features.spatial_dim)

    def _with_note(self, reference: Reference) -> Reference:
        for line in [*reference.notes, *reference.without_spatial(self.features)]:
            self.log(f"note: {line}")
        return reference
