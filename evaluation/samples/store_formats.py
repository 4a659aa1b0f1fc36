"""The two formats of stored samples: WebDataset shards, and PNGs with a note for each range of them."""

import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from tarflow.evaluation.samples.store_check import Shape, damaged_pictures, damaged_shards
from tarflow.evaluation.samples.store_files import Note
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

    def write(self, path: Path, samples: Mapping[int, Encoded]) -> None:
        """Write the samples of a range, ascending, and last the file at `path` that marks it as done."""

    def stored(self, folder: Path) -> Iterator[int]:
        """Every stored sample, found by reading what is there."""

    def damaged(self, folder: Path, sizes: Mapping[str, int], shape: Shape | None) -> dict[Path, str]:
        """Incomplete files, with the reason. `sizes`: bytes of files recorded as complete, by name."""


class Shards:
    """One tar per range, holding 00000123.png and, with a label, 00000123.cls."""

    suffix = ".tar"

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


FORMATS: dict[str, StoreFormat] = {"shards": Shards(), "png": Pictures()}


def _numbers(names: Iterable[str]) -> Iterator[int]:
    """Sample numbers in the names of pictures; other names are skipped."""
    return (int(name[:-4]) for name in names if _PICTURE.fullmatch(name))


def _add_member(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    shard.addfile(info, io.BytesIO(content))
