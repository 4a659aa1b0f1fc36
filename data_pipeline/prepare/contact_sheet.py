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
from tarflow.image_size import size_of

_GAP = 2  # pixels between tiles
_UNREADABLE = 128  # grey


def contact_sheet(
    index: Index | CustomDataset, count: int, tile: int, access: Access | None = None
) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: `count` samples spread evenly over the data set as tiles of `tile` pixels, in rows.

    Tiles are squares, or where the images are known to be rectangles of their shape, with `tile` pixels along the longer side.
    A sample that cannot be read is a grey tile.
    """
    whole = index.image_size if isinstance(index, Index) and index.image_size else (1, 1)
    width, height = (max(1, tile * side // max(whole)) for side in whole)
    reader = reader_of(index, ImageShape(size_of(height, width)), access or Access())
    count = min(count, index.num_samples)
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    sheet = np.full((rows * (height + _GAP), columns * (width + _GAP), 3), 255, dtype=np.uint8)
    for place in range(count):
        try:
            image, _ = reader.read(place * index.num_samples // count)
        except BadSampleError:
            image = np.full((height, width, 3), _UNREADABLE, dtype=np.uint8)
        y, x = place // columns * (height + _GAP), place % columns * (width + _GAP)
        sheet[y : y + height, x : x + width] = image
    reader.close()
    return sheet
