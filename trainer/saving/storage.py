"""Where a save puts its tensors: the part of a disk that it depends on, as an argument that a test can replace."""

import shutil
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from tarflow.files import crc32, fsync_path
from tarflow.trainer.checkpoint.layout import Layout
from tarflow.trainer.checkpoint.pieces import sums_of, write_sums
from tarflow.trainer.checkpoint.tensors import write_tensors
from tarflow.trainer.resilience.fault_injection import fault_point


class CheckpointStorage(Protocol):
    """Takes the files of an uncommitted checkpoint. Committing is renaming, and stays with `checkpoint.commit`."""

    def free_bytes(self, folder: Path) -> int:
        """Space left for files in a folder."""
        ...

    def write(self, folder: Path, tensors: dict[str, Tensor], group: Any) -> dict[str, int]:
        """Write this rank's share of the tensors, durably; CRC-32 of each of its files. Every rank calls it."""
        ...


class DiskStorage:
    """A file system that all ranks share."""

    def __init__(self) -> None:
        self._layout = Layout()

    def free_bytes(self, folder: Path) -> int:
        """Space left for files in a folder."""
        return shutil.disk_usage(folder).free

    def write(self, folder: Path, tensors: dict[str, Tensor], group: Any) -> dict[str, int]:
        """Write this rank's share of the tensors, durably; CRC-32 of each of its files. Every rank calls it."""
        before = set(folder.iterdir())
        write_tensors(folder, tensors, group, self._layout)
        fault_point("save.written")
        rank = dist.get_rank() if group is not None else 0
        mine = [path for path in folder.glob(f"__{rank}_*") if path not in before]
        sums = {path.name: write_sums(path, self._layout.places(path.name)) for path in mine}
        # Each rank syncs its own files: on a network file system their pages are in this machine's memory.
        for path in mine:
            sums[sums_of(path).name] = crc32(sums_of(path))
            fsync_path(path)
            fsync_path(sums_of(path))
        return sums
