"""Saving beside the training: the step waits only while the state is copied to host memory (contract 5).

A save has two halves. *Staging*, in the training thread: copy every tensor into host buffers that are reused from save
to save. *Writing*, in a thread, on a process group of its own (the training's collectives must not meet those of the
save): check the space, write, fsync, checksum, commit, move `latest`, apply retention. One save at a time: the next one
waits for it. Every rank learns the outcome of every save, because the last thing a save does is to tell it to all.
"""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import tarflow.trainer.checkpoint.commit as ckpt
import tarflow.trainer.checkpoint.retention as retention
import tarflow.trainer.ema.snapshots as snapshots
from tarflow.files import crc32, discard, fsync_path, make_folder, write_text
from tarflow.trainer.checkpoint.names import checkpoints_dir
from tarflow.trainer.checkpoint.tensors import write_tensors
from tarflow.trainer.config.schema import CheckpointConfig
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.resilience.fault_injection import fault_point

SPARE = 1.05  # of the tensors' bytes: file headers, marker, configuration
SPARE_BYTES = 1 << 20


class Staging:
    """Host copies of a state, in buffers that live as long as the run."""

    def __init__(self) -> None:
        self._host: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state as it is now, in host memory. The last copy's buffers are used again."""
        on_device = False
        for name, tensor in state.items():
            source = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            on_device |= source.device.type != "cpu"
            held = self._host.get(name)
            local = held._local_tensor if isinstance(held, DTensor) else held
            if local is None or local.shape != source.shape or local.dtype != source.dtype:
                local = torch.empty_like(source, device="cpu", pin_memory=source.device.type == "cuda")
            local.copy_(source, non_blocking=True)
            # Made without the public constructor, which would move the copy back to the mesh's device.
            spec = tensor._spec if isinstance(tensor, DTensor) else None
            self._host[name] = DTensor(local, spec, requires_grad=False) if spec is not None else local
        for name in self._host.keys() - state.keys():
            del self._host[name]
        if on_device and torch.cuda.is_available():
            torch.cuda.synchronize()
        return dict(self._host)


class Channel:
    """Small messages between the ranks of a save, on a process group of its own; alone, there is nothing to send."""

    def __init__(self) -> None:
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None

    @property
    def first(self) -> bool:
        return self.group is None or dist.get_rank() == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values


@dataclass
class Save:
    """One save, under way or over."""

    step: int
    images_seen: int
    began: float = field(default_factory=time.monotonic)
    snapshot: bool = False  # whether the averages are kept for ever besides
    stall_s: float = 0.0  # time that the training stood still for it
    seconds: float = 0.0
    error: str | None = None  # the same on every rank
    name: str = ""
    removed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # of what went wrong after the commit
    tried: int = 0  # optimizer steps until then, those that were passed over too


class Writer:
    """Writes staged states into committed checkpoints, here or in a thread. Every rank has one."""

    def __init__(self, run_dir: Path, policy: CheckpointConfig) -> None:
        self.run_dir, self.policy = run_dir, policy
        self.channel = Channel()
        self._thread: threading.Thread | None = None
        self._save: Save | None = None

    def start(self, save: Save, state: dict[str, Tensor], describe: Callable[[], tuple[str, dict[str, Any]]]) -> None:
        """Write in a thread. `describe`: the configuration's text and what else the marker records."""
        assert self._thread is None, "the save before is not collected"
        self._save = save
        # A daemon: an error elsewhere must not wait for a disk.
        self._thread = threading.Thread(target=self.write, args=(save, state, describe), name="save", daemon=True)
        self._thread.start()

    def collect(self, wait: bool) -> Save | None:
        """The save that ended since the last call, if any; `wait`: for the one under way."""
        if self._thread is None or (not wait and self._thread.is_alive()):
            return None
        self._thread.join()
        self._thread = None
        return self._save

    def write(self, save: Save, state: dict[str, Tensor], describe: Callable[[], tuple[str, dict[str, Any]]]) -> None:
        """Write and commit; what went wrong is left in `save.error`, the same on every rank."""
        try:
            save.error = self._write(save, state, describe)
        except BaseException as error:  # DCP's own error is no Exception; a lost peer ends up here, too
            save.error = _reason(error)
        save.seconds = time.monotonic() - save.began

    def _write(
        self, save: Save, state: dict[str, Tensor], describe: Callable[[], tuple[str, dict[str, Any]]]
    ) -> str | None:
        if save.snapshot:
            outcome = self._write_into(True, save, snapshots.contents(state), describe)
            if isinstance(outcome, Failure):
                return f"snapshot of the averages: {outcome.reason}"
            save.warnings += outcome[2]
        outcome = self._write_into(False, save, state, describe)
        if isinstance(outcome, Failure):
            return outcome.reason
        save.name, save.removed, warnings = outcome
        save.warnings += warnings
        return None

    def _write_into(
        self, snapshot: bool, save: Save, state: dict[str, Tensor], describe: Callable[[], tuple[str, dict[str, Any]]]
    ) -> Any:
        """Write and commit a checkpoint, or a snapshot; its name, what retention removed and warnings, or the failure."""
        temporary = self.channel.broadcast(self._attempt(lambda: self._make_room(snapshot, save.images_seen, state)))
        if isinstance(temporary, Failure):
            return temporary
        mine = self._attempt(lambda: self._write_mine(temporary, state))
        parts = self.channel.gather(mine)
        failures = {f"rank {rank}: {part.reason}" for rank, part in enumerate(parts) if isinstance(part, Failure)}
        outcome: Any = Failure("; ".join(sorted(failures))) if failures else None
        if self.channel.first:
            if outcome is None:
                sums = {name: value for part in parts for name, value in part.items()}
                outcome = self._attempt(lambda: self._commit(snapshot, temporary, save, sums, describe()))
            if isinstance(outcome, Failure):  # it holds space that the next save needs
                discard(temporary)
        return self.channel.broadcast(outcome)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """The action's value, or its failure as a value that can be sent to the other ranks."""
        try:
            return action()
        except BaseException as error:
            return Failure(_reason(error))

    def _make_room(self, snapshot: bool, images_seen: int, state: dict[str, Tensor]) -> Path | None:
        if not self.channel.first:
            return None
        fault_point("save.begin")
        home = snapshots.prepare(self.run_dir) if snapshot else self.run_dir
        folder = make_folder(home, checkpoints_dir(home).name)
        temporary = ckpt.temporary_dir(home, images_seen)  # first, because it frees what an interrupted save left
        needed = int(sum(t.numel() * t.element_size() for t in state.values()) * SPARE) + SPARE_BYTES
        free = shutil.disk_usage(folder).free
        if free < needed:
            discard(temporary)
            raise TrainerError(
                f"a checkpoint needs {needed / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB free; free some space "
                f"or keep fewer: checkpoint.keep_latest={self.policy.keep_latest}, "
                f"checkpoint.keep_every_images={self.policy.keep_every_images}"
            )
        return temporary

    def _write_mine(self, temporary: Path, state: dict[str, Tensor]) -> dict[str, int]:
        """Write this rank's share, durably; the checksums of its files."""
        before = set(temporary.iterdir())
        write_tensors(temporary, state, self.channel.group)
        fault_point("save.written")
        rank = dist.get_rank() if self.channel.group is not None else 0
        mine = [p for p in temporary.glob(f"__{rank}_*") if p not in before]
        for path in mine:  # from here: a network file system has this rank's pages on this machine
            fsync_path(path)
        return {p.name: crc32(p) for p in mine}

    def _commit(
        self, snapshot: bool, temporary: Path, save: Save, sums: dict[str, int], description: tuple[str, dict[str, Any]]
    ) -> tuple[str, list[str], list[str]]:
        text, info = description
        warnings: list[str] = []
        write_text(temporary / "config.yaml", text)
        if snapshot:
            home = snapshots.snapshots_dir(self.run_dir)
            saved = ckpt.commit(home, temporary, save.step, save.images_seen, info, sums, warnings.append)
            return saved.name, [], warnings
        saved = ckpt.commit(self.run_dir, temporary, save.step, save.images_seen, info, sums, warnings.append)
        try:  # a commit that worked is a save that worked, whatever becomes of what it makes superfluous
            removed = retention.apply_retention(
                self.run_dir, self.policy.keep_latest, self.policy.keep_every_images,
                fresh=saved.name, warn=warnings.append,
            )  # fmt: skip
        except OSError as error:
            removed = []
            warnings.append(f"WARNING: retention failed ({_reason(error)}); the next save tries again")
        return saved.name, removed, warnings


@dataclass(frozen=True)
class Failure:
    """Why a part of a save failed."""

    reason: str


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)  # DCP: rank -> (error, traceback)
    if failures:
        rank, (first, _) = next(iter(failures.items()))
        return f"rank {rank}: {_reason(first)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{error}" if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}".splitlines()[0]
