"""Real images at the model's resolution, and the provenance that results record of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.choose_reader import open_data, rule_of
from tarflow.data_pipeline.loading.custom.dataset import CustomDataset
from tarflow.data_pipeline.loading.evaluation_batches import evaluation_batches
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import ImageShape
from tarflow.data_pipeline.storage.changed_shards import check_shards
from tarflow.evaluation.errors import EvaluationError
from tarflow.image_size import Size, plain
from tarflow.models.config import TarFlowConfig

CROP = "largest centred square, bicubic with antialias (data_pipeline.transform.fit)"
BATCH = 64
_RULES = {
    "adm": "ADM's centre crop: halved by a box filter, then bicubic, then the centre (data_pipeline.images.crop)",
    "edm": "EDM's centre crop: the largest centred box, then Lanczos (data_pipeline.images.crop)",
}


def crop_text(size: Size, rule: str = "centre") -> str:
    """What a provenance says of how images got their size."""
    own = CROP if isinstance(size, int) else CROP.replace("square", "rectangle of the same shape")
    return _RULES.get(rule, own)


@dataclass(frozen=True)
class ImageSet:
    """A data set at the size and channels of a model: `limit` images, evenly spaced over the index (0 = all)."""

    data: DataSettings  # `data.train` is the set, be it training or held-out images
    model: TarFlowConfig
    limit: int = 0

    @cached_property
    def index(self) -> Index | CustomDataset:
        """The index of the data set, or the user's own data, opened on first use."""
        return open_data(self.data)

    @property
    def num_images(self) -> int:
        """Images of the selection."""
        total = self.index.num_samples
        return min(self.limit, total) if self.limit else total

    @property
    def skips_damaged(self) -> bool:
        """Whether damaged images are skipped, so that `batches` may give fewer than `num_images`."""
        return self.data.on_error != "strict"

    def batches(
        self, labelled: bool, batch_size: int = BATCH, part: int = 0, parts: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (pixels uint8 [n, C, H, W], labels int64 [n], ids int64 [n]); labels are -1 unless `labelled`.

        `part` of `parts`: one range of the images; together the parts hold every image once.
        """
        classes = self.model.num_classes if labelled else 0
        shape = ImageShape(self.model.image_size, self.model.in_channels, classes)
        limit = self.limit or None
        for batch in evaluation_batches(self.data, shape, batch_size, limit=limit, rank=part, world_size=parts):
            yield batch.images, batch.labels, batch.ids

    def class_counts(self) -> tuple[int, ...]:
        """Images per class, from the index. Raises EvaluationError if the set has no labels, or no index."""
        if self.data.dataset is not None or not isinstance(self.index, Index):
            raise EvaluationError(
                f"sampling.labels=training: how many images {self.data.place} has of each class is not known without reading "
                "them all; set sampling.labels=balanced"
            )
        counts = np.zeros(self.model.num_classes, dtype=np.int64)
        for shard in range(len(self.index.shard_sizes)):
            labels = self.index.rows(shard).labels
            counts += np.bincount(labels[labels >= 0], minlength=len(counts))[: len(counts)]
        if not counts.any():
            raise EvaluationError(
                f"sampling.labels=training: {self.data.train} has no labels; set sampling.labels=balanced"
            )
        return tuple(counts.tolist())

    def provenance(self) -> dict[str, str | int]:
        """What statistics of these images depend on. Raises DataError if the shards changed since they were indexed."""
        if isinstance(self.index, Index):
            check_shards(self.index)
        return {
            "data": self.data.place,
            "fingerprint": self.index.fingerprint,
            "images": self.num_images,
            "selection": "all" if self.num_images == self.index.num_samples else "spread evenly over the index",
            "image_size": plain(self.model.image_size),
            "channels": self.model.in_channels,
            "crop": crop_text(self.model.image_size, rule_of(self.data, self.index, training=False)),
            "damaged images": "left out" if self.skips_damaged else "refused",
        }
