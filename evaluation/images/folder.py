"""A folder of images to score: each decodable file once, in the order of names, converted as training data is.

Subfolders count, linked ones too and each once; files and folders whose names begin with a dot do not. An image is known
by its extension, in any case (`formats.IMAGE_EXTENSIONS`); other files are counted and named, never silently skipped. A
file that cannot be decoded is an error or, with `on_error="skip"`, skipped and listed. Conversion is that of training data
(`data_pipeline.images.decode`): grey, palette, 16-bit, transparency on white, orientation. JPEGs are recognized by content
and counted, since compression artifacts move every metric.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.images.decode import decode
from tarflow.data_pipeline.images.formats import IMAGE_EXTENSIONS, UNREAD_PICTURES, extension_of
from tarflow.data_pipeline.images.identical import image_hashes
from tarflow.data_pipeline.images.opening import read_image
from tarflow.data_pipeline.images.transform import fit
from tarflow.data_pipeline.layout.walk import walk
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.data_set import crop_text
from tarflow.image_size import Size, plain, shown, sides, size_of
from tarflow.trainer.run_dir import is_run

_NAMED = 20  # files named in a result
_JPEG = b"\xff\xd8\xff"


@dataclass
class ImageFolder:
    """The images of a folder at one size. The counts are complete once `batches` is exhausted."""

    root: Path
    channels: int
    size: Size | None  # of the images to score; None = all images must already have one size
    on_error: str = "strict"
    max_pixels: int = MAX_PIXELS  # of the largest image to decode
    files: list[Path] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # files that are not images, or not readable ones
    unread: Counter[str] = field(default_factory=Counter)  # of these, images in unsupported formats, by extension
    broken: list[str] = field(default_factory=list)
    jpegs: int = 0
    resized: int = 0
    used: int = 0
    linked: int = 0  # folders entered through a link
    sha256: str = ""  # of all scored pixels, in order
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))  # of each scored image

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise EvaluationError(f"{self.root} is not a folder of images")
        if is_run(self.root):
            raise EvaluationError(
                f"{self.root} is the directory of a run, whose pictures are grids, not a folder of images: name a folder of "
                "single images, such as those that `tarflow sample` or `tarflow evaluate --save png` writes"
            )
        found = walk(self.root)
        for again, first in found.again:
            raise EvaluationError(
                f"{again} and {first} are the same folder, and its images would count twice: remove one of the links"
            )
        for path in found.files:
            ending = extension_of(path.name)
            if ending in IMAGE_EXTENSIONS:
                self.files.append(path)
                continue
            self.others.append(str(path.relative_to(self.root)))
            self.unread[ending] += ending in UNREAD_PICTURES
        self.unread = +self.unread
        self.linked = len(found.linked)
        self._first_decides = self.size is None
        self.files.sort(key=lambda path: path.relative_to(self.root).as_posix())
        self.others.sort()
        if not self.files:
            unread = f", {self._unread()}" if self.unread else ""
            raise EvaluationError(
                f"{self.root} holds no readable image (png, jpg, webp, ...); {len(self.others)} other files{unread}"
            )

    @property
    def num_images(self) -> int:
        """Files that are images by their names."""
        return len(self.files)

    def batches(self, batch_size: int = 64) -> Iterator[Tensor]:
        """Yield uint8 [n, C, H, W] of that size in the order of names. Raises EvaluationError if no image can be decoded."""
        self.broken, self.jpegs, self.resized, self.used = [], 0, 0, 0
        digest = hashlib.sha256()
        waiting: list[NDArray[np.uint8]] = []
        hashes: list[NDArray[np.uint64]] = []
        for path in self.files:
            image = self._read(path, digest)
            if image is None:
                continue
            waiting.append(image)
            self.used += 1
            if len(waiting) == batch_size:
                hashes.append(image_hashes((batch := _stack(waiting)).numpy()))
                yield batch
                waiting = []
        if waiting:
            hashes.append(image_hashes((batch := _stack(waiting)).numpy()))
            yield batch
        self.hashes = np.concatenate(hashes) if hashes else self.hashes[:0]
        self.sha256 = digest.hexdigest()
        if not self.used:
            raise EvaluationError(
                f"none of the {len(self.files)} images in {self.root} can be decoded: {self.broken[0]}"
            )

    def _read(self, path: Path, digest: Any) -> NDArray[np.uint8] | None:
        """One image, uint8 [H, W, C] of that size, counted and added to `digest`; None if it was skipped."""
        name = path.relative_to(self.root).as_posix()
        try:
            data = read_image(path)
            image = decode(data, self.channels, None, self.max_pixels)
        except (BadSampleError, OSError) as error:
            if self.on_error == "strict":
                raise EvaluationError(f"{path}: {error}; --on-error skip skips such files and lists them") from None
            self.broken.append(f"{name}: {error}")
            return None
        self.jpegs += data.startswith(_JPEG)

        # Without --size the first image decides: resizing unasked would change the metrics.
        height, width = image.shape[:2]
        if self.size is None:
            self.size = size_of(height, width)
        if (height, width) != sides(self.size):
            if self._first_decides:
                raise EvaluationError(
                    f"{path} is {shown((height, width))}, the images before it are {shown(self.size)}; give --size to "
                    "crop and resize all to"
                )
            self.resized += 1
        image = fit(image, self.size)
        digest.update(np.ascontiguousarray(image))
        return image

    def describe(self) -> dict[str, Any]:
        """What was scored and what was not, for result files."""
        return {
            "folder": str(self.root),
            "images": self.used,
            "pixels_sha256": self.sha256,
            "image_size": None if self.size is None else plain(self.size),
            "channels": self.channels,
            "crop": crop_text(self.size or 0),
            "cropped_or_resized": self.resized,
            "jpeg_files": self.jpegs,
            "linked_folders": self.linked,
            "broken_files": len(self.broken),
            "broken": self.broken[:_NAMED],
            "other_files": len(self.others),
            "others": self.others[:_NAMED],
            "unreadable_formats": dict(self.unread),
        }

    def _unread(self) -> str:
        counts = ", ".join(f"{count} .{ending}" for ending, count in sorted(self.unread.items()))
        return f"images in unsupported formats ({counts})"

    def warnings(self) -> list[str]:
        """Reasons to distrust a score of this folder."""
        lines = []
        if self.jpegs:
            lines.append(
                f"{self.jpegs} of {self.used} images in {self.root} are JPEGs, whose compression artifacts move every metric; "
                "store samples as PNG"
            )
        if self.resized:
            lines.append(
                f"{self.resized} of {self.used} images in {self.root} were cropped or resized to {plain(self.size or 0)} pixels"
            )
        if self.unread:
            lines.append(f"{self.root} also holds {self._unread()}: not scored")
        if self.broken:
            lines.append(f"{len(self.broken)} files in {self.root} cannot be decoded and were left out")
        return lines


def _stack(images: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
