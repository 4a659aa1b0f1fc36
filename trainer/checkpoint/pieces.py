"""Pieces of tensors in a checkpoint's files, each with a checksum of its own: who wants a few reads these alone.

Beside `__3_0.distcp`, which holds what rank 3 wrote, lies `__3_0.sums`: where each piece begins, and its CRC-32. The marker
holds the checksums of both. A checkpoint of an earlier version has no such files: there a file that is read from is checked as
a whole first.
"""

import io
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from tarflow.files import open_to_read, read_bytes, write_new
from tarflow.records import DamagedFileError
from tarflow.trainer.checkpoint.marker import WAY_OUT, Checkpoint, require_file

ENTRY = struct.Struct("<QQ")  # where a piece begins, and its CRC-32
BLOCK = 1 << 22


def sums_of(path: Path | str) -> Path:
    """The file of checksums that belongs to a file of tensors."""
    return Path(path).with_suffix(".sums")


def write_sums(path: Path, places: Iterable[tuple[int, int]]) -> int:
    """Write the checksums of a file's pieces, which lie at these (offsets, lengths); the CRC-32 of the file as a whole."""
    entries, whole = [], 0
    with open_to_read(path) as file:
        for start, length in sorted(places):
            left, value = length, 0
            file.seek(start)
            while left and (data := file.read(min(left, BLOCK))):
                left, value, whole = left - len(data), zlib.crc32(data, value), zlib.crc32(data, whole)
            entries.append(ENTRY.pack(start, value))
        assert file.tell() == path.stat().st_size, f"{path}: bytes that belong to no piece"
    write_new(sums_of(path), b"".join(entries))
    return whole


class PieceSums:
    """The checksums of the pieces of a checkpoint. `trusted`: its files have been read and found intact before."""

    def __init__(self, checkpoint: Checkpoint, trusted: bool) -> None:
        self.checkpoint, self.trusted = checkpoint, trusted
        self._tables: dict[str, dict[int, int] | None] = {}

    def check(self, name: str, start: int, data: bytes) -> None:
        """Raise DamagedFileError unless these bytes are those of a file that was committed."""
        if name not in self._tables:
            self._tables[name] = self._table(name)
        table = self._tables[name]
        if table is not None and table.get(start) != zlib.crc32(data):
            raise DamagedFileError(self.checkpoint.path, f"the checksum of its file {name} is wrong", WAY_OUT)

    def _table(self, name: str) -> dict[int, int] | None:
        """The checksums by offset; None for a file that is known to be intact as a whole."""
        beside = sums_of(name).name
        if beside not in self.checkpoint.sizes:
            if not self.trusted:
                require_file(self.checkpoint, name)
            return None
        require_file(self.checkpoint, beside)
        data = read_bytes(self.checkpoint.path / beside)
        if len(data) % ENTRY.size:
            raise DamagedFileError(self.checkpoint.path, f"its file {beside} is no list of checksums", WAY_OUT)
        return dict(ENTRY.iter_unpack(data))


class PieceReader(dcp.FileSystemReader):
    """Reads by metadata that were checked (torch's own would be unpickled), tensors only, each piece against its checksum."""

    def __init__(self, folder: Path, metadata: Metadata, sums: PieceSums) -> None:
        super().__init__(folder)
        self.folder, self.metadata, self.sums = folder, metadata, sums

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """What was given."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the parts of tensors that a plan asks for, file by file, from the front to the back."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                raise ValueError("a value that is not a tensor")  # torch would unpickle it
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in sorted(by_file.items()):
            with open_to_read(self.folder / name) as file:
                for item in sorted(items, key=lambda item: self.storage_data[item.storage_index].offset):
                    self._fill(file, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, file: Any, item: Any, planner: LoadPlanner) -> None:
        place = self.storage_data[item.storage_index]
        file.seek(place.offset)
        data = file.read(place.length)
        self.sums.check(place.relative_path, place.offset, data)
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths)):
            tensor = tensor.narrow(dimension, offset, length)
        target = planner.resolve_tensor(item).detach()
        if target.shape != tensor.shape:
            raise ValueError(
                f"{item.storage_index.fqn}: a piece is {list(tensor.shape)} instead of {list(target.shape)}"
            )
        target.copy_(tensor)
        planner.commit_tensor(item, target)
