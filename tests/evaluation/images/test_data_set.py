"""Real images and the statistics that are looked for by what they hold."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.references.compute import reference_statistics
from tarflow.evaluation.references.reference import Reference, cache_path, full_provenance
from tarflow.models.config import TarFlowConfig
from tests.helpers.features import NoSpatial

MODEL = TarFlowConfig(
    image_size=8, patch_size=4, in_channels=1, channels=16, num_blocks=1, layers_per_block=1, head_channels=8
)


class FakeFeatures(NoSpatial):
    name, sha256, preprocessing, dim = "fake", "f00d", "none", 4

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)[:, :4] / 255


def write_set(path: Path, shade: int) -> None:
    """Eight images in a tar; only pixels depend on the shade."""
    with tarfile.open(path, "w") as tar:
        for i in range(8):
            picture = io.BytesIO()
            Image.fromarray(np.full((8, 8), shade + i, dtype=np.uint8)).save(picture, "BMP")
            info = tarfile.TarInfo(f"{i}.bmp")
            info.size = len(picture.getvalue())
            tar.addfile(info, io.BytesIO(picture.getvalue()))


def statistics(folder: Path) -> Reference:
    images = ImageSet(DataSettings.of(folder), MODEL)
    path = cache_path(folder, full_provenance(images.provenance(), FakeFeatures()))
    return reference_statistics(path, images, FakeFeatures())


@pytest.mark.case("V04")
def test_statistics_of_other_images_of_the_same_sizes_are_made_anew(tmp_path: Path) -> None:
    """Those of the images that had been there gave a feature mean of .741 for .185."""
    shard = tmp_path / "a.tar"
    write_set(shard, 10)
    build_index(tmp_path, [shard])
    before, size = statistics(tmp_path), shard.stat().st_size
    write_set(shard, 200)
    assert shard.stat().st_size == size
    os.utime(shard, ns=(0, 12345))
    with pytest.raises(DataError, match="holds other bytes than when it was indexed"):  # not indexed again: refused
        statistics(tmp_path)
    build_index(tmp_path, [shard])
    after = statistics(tmp_path)
    assert after.path != before.path
    assert float(before.statistics.parts()[1].mean()) == pytest.approx(13.5 / 255)
    assert float(after.statistics.parts()[1].mean()) == pytest.approx(203.5 / 255)
