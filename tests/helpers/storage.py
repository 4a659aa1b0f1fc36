"""A disk that a test can fill or break in the middle of a save."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

from torch import Tensor

from tarflow.trainer.saving.storage import DiskStorage


class Disk(DiskStorage):
    """The disk there is, until a test says otherwise."""

    free: int | None = None  # bytes left; None: as many as there are
    breaks = False  # the disk is full once the tensors are written

    def __init__(self) -> None:
        super().__init__()
        self.ready = threading.Event()  # cleared: writing waits
        self.ready.set()

    def free_bytes(self, folder: Path) -> int:
        return super().free_bytes(folder) if self.free is None else self.free

    def write(self, folder: Path, tensors: dict[str, Tensor], group: Any) -> dict[str, int]:
        self.ready.wait(60)
        written = super().write(folder, tensors, group)
        if self.breaks:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")
        return written
