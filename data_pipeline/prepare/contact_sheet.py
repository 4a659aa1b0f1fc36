"""A contact sheet: what a data set looks like, at a glance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.custom.dataset import CustomDataset
from tarflow.data_pipeline.loading.sample_reader import reader_of
from tarflow.data_pipeline.loading.shape import ImageShape
from tarflow.data_pipeline.storage.access import Access

_GAP = 2  # pixels between tiles
_UNREADABLE = 128  # grey


def contact_sheet(
    index: Index | CustomDataset, count: int, tile: int, access: Access | None = None
) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: `count` samples spread evenly over the data set as tiles of `tile` pixels, in rows.

    A sample that cannot be read is a grey tile.
    """
    reader = reader_of(index, ImageShape(tile), access or Access())
    count = min(count, index.num_samples)
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    sheet = np.full((rows * (tile + _GAP), columns * (tile + _GAP), 3), 255, dtype=np.uint8)
    for place in range(count):
        try:
            image, _ = reader.read(place * index.num_samples // count)
        except BadSampleError:
            image = np.full((tile, tile, 3), _UNREADABLE, dtype=np.uint8)
        y, x = place // columns * (tile + _GAP), place % columns * (tile + _GAP)
        sheet[y : y + tile, x : x + tile] = image
    reader.close()
    return sheet
