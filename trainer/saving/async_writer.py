"""Saving beside the training: a step waits only while the state is copied to host memory.

A save has two halves. *Staging* (`staging.py`), in the training thread, copies every tensor into host buffers. *Writing*, in
a thread and on a process group of its own (its collectives must not meet those of the training), checks the free space,
writes, syncs, commits, moves `latest` and applies retention. Every rank learns the outcome of every save: the last thing
that a save does is to broadcast it.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

import tarflow.trainer.checkpoint.commit as ckpt
import tarflow.trainer.checkpoint.retention as retention
import tarflow.trainer.ema.snapshots as snapshots
from tarflow.devices import keep_device
from tarflow.files import discard, make_folder, write_text
from tarflow.trainer.checkpoint.names import checkpoints_dir
from tarflow.trainer.config.schema import CheckpointConfig
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.parallel.world import broadcast, gather
from tarflow.trainer.resilience.fault_injection import fault_point
from tarflow.trainer.resilience.limits import NO_LIMIT_S, set_timeout
from tarflow.trainer.saving.handle import SaveHandle
from tarflow.trainer.saving.storage import CheckpointStorage, DiskStorage

SPARE = 1.05  # of the tensors' bytes: file headers, marker, configuration
SPARE_BYTES = 1 << 20

T = TypeVar("T")
# The configuration's text, and what else the marker records.
Describe = Callable[[], tuple[str, dict[str, Any]]]


class SaveError(TrainerError):
    """Why a save failed, with the same text on every rank."""


class Committed(NamedTuple):
    """What rank 0 tells the others of a commit."""

    name: str
    removed: list[str]
    warnings: list[str]


class AsyncWriter:
    """Writes states into committed checkpoints, in a thread or at once. Every rank has one and calls it alike."""

    def __init__(self, run_dir: Path, policy: CheckpointConfig, storage: CheckpointStorage | None = None) -> None:
        self.run_dir, self.policy, self.storage = run_dir, policy, storage or DiskStorage()
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        if self.group is not None:
            # A save beside the training may wait for a disk for as long as it likes: a rank that is gone closes its
            # connections, and what waits for a save in vain is ended by the watchdog.
            set_timeout(NO_LIMIT_S, self.group)
        self.first = self.group is None or dist.get_rank() == 0

    def start(self, save: SaveHandle, state: dict[str, Tensor], describe: Describe) -> None:
        """Write in a thread, which `save` then stands for. One at a time: the caller waits for the save before."""
        # A daemon: when training ends in an error, the process must not wait for a disk.
        write = keep_device(self.write)
        save.thread = threading.Thread(target=write, args=(save, state, describe), name="save", daemon=True)
        save.thread.start()

    def write(self, save: SaveHandle, state: dict[str, Tensor], describe: Describe) -> None:
        """Write and commit; a failure is not raised but left in `save.error`, the same on every rank."""
        try:
            if save.snapshot:
                save.warnings += self._write_snapshot(save, state, describe).warnings
            committed = self._write_into(self.run_dir, save, state, describe)
            save.name, save.removed = committed.name, committed.removed
            save.warnings += committed.warnings
        except BaseException as error:  # noqa: BLE001 - nobody else would see it: this is the end of a thread
            save.error = _reason(error)
        save.seconds = time.monotonic() - save.began

    def _write_snapshot(self, save: SaveHandle, state: dict[str, Tensor], describe: Describe) -> Committed:
        home = snapshots.snapshots_dir(self.run_dir)
        try:
            return self._write_into(home, save, snapshots.contents(state), describe)
        except SaveError as error:
            raise SaveError(f"snapshot of the averages: {error}") from None

    def _write_into(self, home: Path, save: SaveHandle, state: dict[str, Tensor], describe: Describe) -> Committed:
        """Write and commit into the run's directory, or into that of its snapshots. Raises SaveError on every rank."""
        images_seen = save.position.images_seen
        temporary = self._on_first(lambda: self._make_room(home, images_seen, state))
        try:
            checksums = self._on_all(lambda: self.storage.write(temporary, state, self.group))
            merged = {name: checksum for files in checksums for name, checksum in files.items()}
            return self._on_first(lambda: self._commit(home, temporary, save, merged, describe()))
        except SaveError:
            # It takes up space that the next save needs; the other ranks wait, or they could begin that one meanwhile.
            self._on_first(lambda: discard(temporary))
            raise

    def _make_room(self, home: Path, images_seen: int, state: dict[str, Tensor]) -> Path:
        """An empty directory to write into. Raises TrainerError if the disk has no space for the state."""
        fault_point("save.begin")
        if home != self.run_dir:
            snapshots.prepare(self.run_dir)
        folder = make_folder(home, checkpoints_dir(home).name)
        temporary = ckpt.temporary_dir(home, images_seen)  # first, because it frees what an interrupted save left
        needed = int(sum(t.numel() * t.element_size() for t in state.values()) * SPARE) + SPARE_BYTES
        free = self.storage.free_bytes(folder)
        if free < needed:
            discard(temporary)
            raise TrainerError(
                f"a checkpoint needs {needed / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB free; free some space "
                f"or keep fewer: checkpoint.keep_latest={self.policy.keep_latest}, "
                f"checkpoint.keep_every_images={self.policy.keep_every_images}"
            )
        return temporary

    def _commit(
        self,
        home: Path,
        temporary: Path,
        save: SaveHandle,
        checksums: dict[str, int],
        description: tuple[str, dict[str, Any]],
    ) -> Committed:
        config_text, info = description
        write_text(temporary / "config.yaml", config_text)
        warnings: list[str] = []
        position = save.position
        saved = ckpt.commit(home, temporary, position.step, position.images_seen, info, checksums, warnings.append)
        if home != self.run_dir:  # snapshots are kept for good
            return Committed(saved.name, [], warnings)
        removed: list[str] = []
        try:
            removed = retention.apply_retention(
                home, self.policy.keep_latest, self.policy.keep_every_images, fresh=saved.name, warn=warnings.append
            )
        except OSError as error:
            # The checkpoint is committed, whatever becomes of those that it makes superfluous.
            warnings.append(f"WARNING: retention failed ({_reason(error)}); the next save tries again")
        return Committed(saved.name, removed, warnings)

    def _on_first(self, action: Callable[[], T]) -> T:
        """What an action returns on rank 0, on every rank; or its failure, raised on every rank as a SaveError."""
        outcome = broadcast(_attempt(action) if self.first else None, self.group)
        if isinstance(outcome, SaveError):
            raise outcome
        return outcome  # type: ignore[return-value]

    def _on_all(self, action: Callable[[], T]) -> list[T]:
        """What an action returns on each rank, on every rank; or SaveError with the failures of all ranks."""
        outcomes = gather(_attempt(action), self.group)
        failed = [f"rank {rank}: {one}" for rank, one in enumerate(outcomes) if isinstance(one, SaveError)]
        if failed:
            raise SaveError("; ".join(sorted(failed)))
        return [one for one in outcomes if not isinstance(one, SaveError)]


def _attempt(action: Callable[[], T]) -> T | SaveError:
    """What an action returns, or its failure as a value that can be sent to the other ranks."""
    try:
        return action()
    except BaseException as error:  # noqa: BLE001 - the other ranks wait for an answer, whatever happened here
        return SaveError(_reason(error))


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)  # DCP: rank -> (error, traceback)
    if failures:
        rank, (first, _) = next(iter(failures.items()))
        return f"rank {rank}: {_reason(first)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{error}" if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}".splitlines()[0]
