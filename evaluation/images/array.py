"""Images in one .npz file, as ADM's evaluator takes them: `arr_0`, uint8 [N, H, W, 3]. Written and read a few at a time."""

import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tarflow.data_pipeline.images.identical import image_hashes
from tarflow.data_pipeline.images.transform import fit
from tarflow.evaluation.errors import EvaluationError
from tarflow.files import write_atomic
from tarflow.image_size import Size, plain, sides, size_of
from tarflow.npz import declared, rows
from tarflow.records import DamagedFileError

NAME = "arr_0"
WHAT, WAY_OUT = "a file of images (arr_0)", "name another file"


@dataclass
class ImageArray:
    """The images of a file at one size. The counts are complete once `batches` is exhausted."""

    root: Path
    channels: int
    size: Size | None  # of the images to score; None = the images' own
    resized: int = 0
    used: int = 0
    sha256: str = ""  # of all scored pixels, in order
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))  # of each scored image

    def __post_init__(self) -> None:
        arrays = declared(self.root, what=WHAT, way_out=WAY_OUT)
        if NAME not in arrays:
            raise EvaluationError(f"{self.root} holds no images: there is no array {NAME} in it")
        found = arrays[NAME]
        if found.dtype != np.uint8 or len(found.shape) != 4 or found.shape[3] not in (1, 3) or 0 in found.shape:
            raise EvaluationError(
                f"{self.root}: {NAME} is {found.dtype} {list(found.shape)}, expected uint8 [images, height, width, 3]"
            )
        self.num_images, height, width, _ = found.shape
        if self.size is None:
            self.size = size_of(height, width)
        self._fits = (height, width) == sides(self.size)

    def batches(self, batch_size: int = 64) -> Iterator[Tensor]:
        """Yield uint8 [n, C, H, W] of that size in their order."""
        self.resized, self.used = 0, 0
        digest = hashlib.sha256()
        hashes: list[NDArray[np.uint64]] = []
        for array in rows(self.root, NAME, batch_size, what=WHAT, way_out=WAY_OUT):
            images = np.stack([self._converted(image) for image in array])
            digest.update(images.tobytes())
            batch = torch.from_numpy(images).permute(0, 3, 1, 2)
            hashes.append(image_hashes(batch.numpy()))
            self.used += len(batch)
            self.resized += 0 if self._fits else len(batch)
            yield batch
        self.hashes, self.sha256 = np.concatenate(hashes), digest.hexdigest()

    def _converted(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """[H, W, 1 or 3] -> [height, width, channels] of that size."""
        if image.shape[2] != self.channels:
            picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
            image = np.asarray(picture.convert("L" if self.channels == 1 else "RGB")).reshape(
                *image.shape[:2], self.channels
            )
        assert self.size is not None
        return np.ascontiguousarray(fit(image, self.size))

    def describe(self) -> dict[str, Any]:
        """What was scored, for result files."""
        return {
            "file": str(self.root), "images": self.used, "pixels_sha256": self.sha256, "image_size": plain(self.size or 0),
            "channels": self.channels, "cropped_or_resized": self.resized,
        }  # fmt: skip

    def warnings(self) -> list[str]:
        """Reasons to distrust a score of this file."""
        if not self.resized:
            return []
        size = plain(self.size or 0)
        return [f"{self.resized} of {self.used} images in {self.root} were cropped or resized to {size} pixels"]


def write_array(
    path: Path,
    shape: tuple[int, int, int, int],
    images: Iterable[Tensor],
    beside: Mapping[str, NDArray[np.float64]] = MappingProxyType({}),
) -> None:
    """Write images, uint8 [C, H, W] each, as `arr_0` of the shape [N, H, W, 3]; grey ones with three equal channels.

    `beside`: further arrays of the file. One image is in memory at a time. The same content gives the same bytes. The file
    appears complete or not at all. Raises DamagedFileError where the images are not as many.
    """

    def write(temporary: Path) -> None:
        written = 0
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, array in beside.items():
                with _member(archive, name) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
            with _member(archive, NAME) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for image in images:
                    file.write(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy().tobytes())
                    written += 1
        if written != shape[0]:
            raise DamagedFileError(path, f"{written} images came, not {shape[0]}", "start the command again")

    write_atomic(path, write)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A stream into the archive. A `ZipInfo` of its own has no time in it."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
