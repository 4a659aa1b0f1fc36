"""The formats of stored samples: WebDataset shards, also with one array of all, and PNGs with a note for each range."""

import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from tarflow.evaluation.images.array import write_array
from tarflow.evaluation.samples.png_folder import from_png
from tarflow.evaluation.samples.store_check import Shape, damaged_pictures, damaged_shards
from tarflow.evaluation.samples.store_files import RANGE_NAME, Note
from tarflow.files import create_empty, listed, make_folder, open_to_read, put_once, write_new
from tarflow.leases import unique_name
from tarflow.records import DamagedFileError, save_record

_PICTURE = re.compile(r"\d{8,18}\.png")


class Encoded(NamedTuple):
    """A sample as it is stored."""

    png: bytes
    label: int  # -1 = none


class StoreFormat(Protocol):
    """How ranges of samples lie in a folder. A range's file is named samples-FIRST-LAST with this suffix."""

    suffix: str
    array: bool  # whether an array of all samples is made from the ranges in the end

    def write(self, path: Path, samples: Mapping[int, Encoded]) -> None:
        """Write the samples of a range, ascending, and last the file at `path` that marks it as done."""

    def stored(self, folder: Path) -> Iterator[int]:
        """Every stored sample, found by reading what is there."""

    def damaged(self, folder: Path, sizes: Mapping[str, int], shape: Shape | None) -> dict[Path, str]:
        """Incomplete files, with the reason. `sizes`: bytes of files recorded as complete, by name."""


class Shards:
    """One tar per range, holding 00000123.png and, with a label, 00000123.cls."""

    suffix = ".tar"
    array = False

    def write(self, path: Path, samples: Mapping[int, Encoded]) -> None:
        """Write the shard under a temporary name, then put it in place."""
        temporary = path.with_name(f".{path.name}.{unique_name()}.tmp")
        try:
            create_empty(temporary)
            with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as shard:
                for index, (png, label) in samples.items():
                    _add_member(shard, f"{index:08d}.png", png)
                    if label >= 0:
                        _add_member(shard, f"{index:08d}.cls", str(label).encode())
            put_once(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def stored(self, folder: Path) -> Iterator[int]:
        """Every sample in the shards. Raises DamagedFileError."""
        for path in listed(folder, "samples-*.tar"):
            try:
                with open_to_read(path) as file, tarfile.open(fileobj=file, mode="r:") as shard:
                    yield from _numbers(shard.getnames())
            except tarfile.TarError as error:
                raise DamagedFileError(path, str(error), "remove it, and its samples are drawn again") from None

    def damaged(self, folder: Path, sizes: Mapping[str, int], shape: Shape | None) -> dict[Path, str]:
        """Incomplete shards."""
        return damaged_shards(folder, sizes, shape)


class Pictures:
    """PNGs in images/, and one note per range with their labels and sizes."""

    suffix = ".json"
    array = False

    def write(self, path: Path, samples: Mapping[int, Encoded]) -> None:
        """Write the pictures, then the note: a range without its note counts as missing."""
        images = make_folder(path.parent, "images")
        for index, sample in samples.items():
            temporary = path.with_name(f".{index}.{unique_name()}.tmp")
            write_new(temporary, sample.png)
            put_once(temporary, images / f"{index:08d}.png")
        # Sizes of the files in place: where another worker was first, `put_once` has kept its picture.
        labels = {str(index): sample.label for index, sample in samples.items()}
        sizes = {str(index): (images / f"{index:08d}.png").stat().st_size for index in samples}
        temporary = path.with_name(f".{path.name}.{unique_name()}.tmp")
        save_record(temporary, Note.model_validate({"labels": labels, "sizes": sizes}))
        put_once(temporary, path)

    def stored(self, folder: Path) -> Iterator[int]:
        """Every sample in images/."""
        yield from _numbers(path.name for path in listed(folder / "images", "*.png"))

    def damaged(self, folder: Path, sizes: Mapping[str, int], shape: Shape | None) -> dict[Path, str]:
        """Incomplete pictures, and the notes of their ranges."""
        return damaged_pictures(folder, sizes, shape)


class ShardsAndArray(Shards):
    """Shards, from which `samples.npz` is made: uint8 [N, H, W, 3] as `arr_0`, as ADM's evaluator takes them."""

    array = True


FORMATS: dict[str, StoreFormat] = {"shards": Shards(), "png": Pictures(), "npz": ShardsAndArray()}


def write_samples(path: Path, folder: Path, number: int, shape: Shape) -> None:
    """Write all samples of the shards in `folder`, `number` of them, ascending; one is in memory at a time.

    The bytes depend on the samples alone, not on how they are split into shards. The file appears complete or not at all.
    """
    _, height, width = shape
    write_array(path, (number, height, width, 3), _pictures(folder))


def _pictures(folder: Path) -> Iterator[Tensor]:
    """uint8 [C, H, W] of every sample once, ascending. Ranges may overlap where commands cut them differently."""
    ranges = [(path, name) for path in listed(folder, "samples-*.tar") if (name := RANGE_NAME.fullmatch(path.name))]
    last = -1
    for path, _ in sorted(ranges, key=lambda found: (int(found[1][1]), int(found[1][2]))):
        with open_to_read(path) as file, tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                for index in _numbers([member.name]):
                    content = shard.extractfile(member)
                    if index > last and content is not None:
                        last = index
                        yield from_png(io.BytesIO(content.read()))


def _numbers(names: Iterable[str]) -> Iterator[int]:
    """Sample numbers in the names of pictures; other names are skipped."""
    return (int(name[:-4]) for name in names if _PICTURE.fullmatch(name))


def _add_member(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    shard.addfile(info, io.BytesIO(content))
