"""Reads pieces of tensors out of a checkpoint's files: those that are asked for, each against its checksum.

A file holds one piece after the other, and torch writes each of them as a zip archive, with a CRC-32 of everything in it,
which torch itself does not look at. So a reader of one set of weights need not read the rest of a checkpoint to know that it
got what was written.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from tarflow.files import open_to_read


class WrongChecksumError(ValueError):
    """The bytes of a piece are not those that were written."""


class PieceReader(dcp.FileSystemReader):
    """Reads by metadata that were checked (torch's own would be unpickled), and tensors only."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.folder, self.metadata = folder, metadata

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
        data = io.BytesIO(file.read(place.length))
        _check(data, place.relative_path)
        tensor = torch.load(data, map_location="cpu", weights_only=True)
        for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths)):
            tensor = tensor.narrow(dimension, offset, length)
        target = planner.resolve_tensor(item).detach()
        if target.shape != tensor.shape:
            raise ValueError(
                f"{item.storage_index.fqn}: a piece is {list(tensor.shape)} instead of {list(target.shape)}"
            )
        target.copy_(tensor)
        planner.commit_tensor(item, target)


def _check(data: io.BytesIO, name: str) -> None:
    """Raise WrongChecksumError unless all that an archive holds has its checksum."""
    try:
        with zipfile.ZipFile(data) as archive:
            members = archive.infolist()
            # torch compresses nothing; what claims to be more than there is would take for ever to look at.
            plain = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            intact = plain and sum(member.file_size for member in members) <= len(data.getbuffer())
            intact = intact and archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, ValueError):
        intact = False
    if not intact:
        raise WrongChecksumError(f"the checksum of its file {name} is wrong")
    data.seek(0)
