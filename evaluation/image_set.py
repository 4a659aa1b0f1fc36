"""Real images as the model sees them, and what a result must say about where they come from."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.loader import eval_batches
from tarflow.data_pipeline.storage.open_index import open_index
from tarflow.data_pipeline.storage.remote import Access
from tarflow.evaluation.errors import EvaluationError
from tarflow.models.config import TarFlowConfig

CROP = "largest centred square, bicubic with antialias (data_pipeline.transform.fit)"
BATCH = 64


@dataclass(frozen=True)
class ImageSet:
    """A data set at the size and channels of a model; `limit` images spread evenly over the index (0 = all)."""

    root: str | Path
    model: TarFlowConfig
    on_error: str = "strict"
    limit: int = 0
    access: Access | None = None  # how remote data are reached

    @cached_property
    def index(self) -> Index:
        return open_index(self.root, self.access)

    @property
    def num_images(self) -> int:
        total = self.index.num_samples
        return min(self.limit, total) if self.limit else total

    def batches(
        self, labelled: bool, batch_size: int = BATCH, part: int = 0, parts: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(pixels uint8 [n, C, H, W], labels int64 [n], ids int64 [n]); labels are -1 unless `labelled`.

        `part` of `parts`: one stretch of the images; together the stretches hold every image once.
        """
        batches = eval_batches(
            self.root,
            image_size=self.model.image_size,
            channels=self.model.in_channels,
            batch_size=batch_size,
            rank=part,
            world_size=parts,
            limit=self.limit or None,
            num_classes=self.model.num_classes if labelled else 0,
            on_error=self.on_error,
            access=self.access,
        )
        for batch in batches:
            yield batch.images, batch.labels, batch.ids

    def class_counts(self) -> tuple[int, ...]:
        """How many images each class has, from the index."""
        counts = np.zeros(self.model.num_classes, dtype=np.int64)
        for shard in range(len(self.index.shard_sizes)):
            labels = self.index.rows(shard).labels
            counts += np.bincount(labels[labels >= 0], minlength=len(counts))[: len(counts)]
        if not counts.any():
            raise EvaluationError(f"sampling.labels=training: {self.root} has no labels; set sampling.labels=balanced")
        return tuple(counts.tolist())

    def provenance(self) -> dict[str, str | int]:
        """What statistics of these images depend on (contract 9)."""
        return {
            "data": str(self.root),
            "fingerprint": self.index.fingerprint,
            "images": self.num_images,
            "selection": "all" if self.num_images == self.index.num_samples else "spread evenly over the index",
            "image_size": self.model.image_size,
            "channels": self.model.in_channels,
            "crop": CROP,
            "damaged images": "refused" if self.on_error == "strict" else "left out",
        }
