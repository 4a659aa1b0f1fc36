"""The real images that samples are held against: feature network, training images, their statistics.

All checkpoints and all variants of a run share them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from evaluation.chunks import SharedWork
from evaluation.data import ImageSet
from evaluation.features import Features
from evaluation.reference import Provenance, Reference, cache_path, full_provenance, reference_statistics
from evaluation.settings import EvaluationSettings
from trainer.config import Config


@dataclass
class RealSide:
    """Made on first use and kept."""

    evals: Path  # where statistics are stored
    config: Config
    settings: EvaluationSettings
    device: torch.device
    path: Path | None = None  # stored statistics to use; None = computed once from data.train
    say: Callable[[str], None] = print

    @cached_property
    def features(self) -> Features:
        return Features(self.settings.features, self.device)

    def images(self, limit: int) -> ImageSet:
        """Training images; `limit` of them, spread evenly (0 = all)."""
        data = self.config.data
        return ImageSet(data.train, self.config.model, data.on_error, limit, data.access)

    @cached_property
    def reference(self) -> Reference:
        """Reference statistics, from the file if there is one."""
        images = self.images(self.settings.reference_images)
        provenance = full_provenance(images.provenance(), self.features)
        path = self.path or cache_path(self.evals, provenance)
        if self.path is None and not path.is_file():
            self.say(f"reference statistics of {images.num_images} images with {self.features.name}, once")
            self._share(path, lambda: self._measure(images, path, provenance))
        return self._measure(images, path, provenance)

    def _measure(self, images: ImageSet, path: Path, provenance: Provenance) -> Reference:
        return reference_statistics(
            path, provenance, self.features, lambda: (pixels for pixels, _, _ in images.batches(False))
        )

    def _share(self, path: Path, measure: Callable[[], object]) -> None:
        """Let one of the workers that start together do it; the others wait."""
        work = SharedWork(self.evals / "work" / path.stem, {}, self.config.evaluation.lease_s)

        def compute(name: str, temporary: Path) -> None:
            measure()
            temporary.touch()

        work.work_through(["measured"], compute, over=path.is_file)
        work.remove()
