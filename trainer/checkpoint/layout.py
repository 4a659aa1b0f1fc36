"""How the tensors of a state lie in the files of a checkpoint, and saving by it: planned once, then only written.

torch's distributed checkpoint (DCP) plans each save anew: every rank sends rank 0 what it holds, which sends back who writes
what, learns where everything was put, and sends the list of all of it to every rank. For 128 ranks of a large model that is
half a million items, three times over. But a run saves the same tensors again and again. So the ranks keep what they were
told at the last save, and rank 0 the list; as long as nothing changed, two words per rank are exchanged.

torch's own cache of plans (`enable_plan_caching`) saves the first of the three only, lives as long as the process, and
rank 0 keeps the plans of all ranks as objects.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from tarflow.files import read_bytes, write_new
from tarflow.trainer.checkpoint.metadata import NAME

# What a rank says of its part of a save.
_FAILED, _CHANGED, _SAME = range(3)


class Layout:
    """What one rank keeps between the saves of one state. Every rank has one, and calls it alike."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Plan the next save anew."""
        self._shapes: list[Any] = []
        self._plan: SavePlan | None = None  # of this rank
        self._results: list[Any] = []  # where this rank put each tensor
        self._listed: bytes | None = None  # on rank 0: the list of all tensors, as it stands on disk

    def places(self, name: str) -> list[tuple[int, int]]:
        """(offset, length) of the pieces that this rank put into a file at the last save."""
        stored = [result.storage_data for result in self._results]
        return [(place.offset, place.length) for place in stored if place.relative_path == name]

    def save(self, folder: Path, tensors: dict[str, Any], group: Any) -> None:
        """Write this rank's share of the tensors, and on rank 0 the list of all. Raises what went wrong on this rank."""
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        first = group is None or dist.get_rank(group) == 0
        known = self._plan is not None and self._shapes == _shapes(tensors)
        unchanged = _least(_SAME if known else _CHANGED, group) == _SAME
        if not unchanged or not self._write_again(folder, tensors, group, first):
            self._plan_and_write(folder, tensors, group)

    def _write_again(self, folder: Path, tensors: dict[str, Any], group: Any, first: bool) -> bool:
        """Write by the plan that is known; False if something came to lie elsewhere on any rank."""
        planner, writer = _Planner(), _Writer(folder)
        assert self._plan is not None
        said = _FAILED
        try:
            planner.set_up_planner(dict(tensors), None, first)
            writer.set_up_storage_writer(first)
            planner.finish_plan(writer.prepare_local_plan(self._plan))
            results = writer.write_data(planner.plan, planner).value()
            said = _SAME if results == self._results else _CHANGED
        finally:
            # Also of a failure: the other ranks wait for this word. Whoever called hears of it from the rank that failed.
            agreed = _least(said, group)
        if agreed == _SAME and first:
            assert self._listed is not None
            write_new(folder / NAME, self._listed)
        return agreed != _CHANGED

    def _plan_and_write(self, folder: Path, tensors: dict[str, Any], group: Any) -> None:
        self.forget()
        planner, writer = _Planner(), _Writer(folder)
        writer.planner = planner
        dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
        self._listed = read_bytes(folder / NAME) if planner.is_coordinator else None
        self._shapes, self._plan, self._results = _shapes(tensors), planner.plan, writer.results


class _Planner(dcp.DefaultSavePlanner):
    """torch's planner, which keeps the list of all tensors on rank 0: DCP sends every rank what it is given here."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, self.all_tensors = super().create_global_plan(all_plans)
        return plans, Metadata({})


class _Writer(dcp.FileSystemWriter):
    """torch's writer of files, which keeps what it wrote. Syncing the files is left to the caller."""

    planner: _Planner

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)
        self.results: list[Any] = []

    def storage_meta(self) -> StorageMeta:
        """Nothing: a folder's name before its commit, and an identity that nobody asks for, differ at each save."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        """Write this rank's tensors."""
        done = super().write_data(plan, planner)
        self.results = done.value()
        return done

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:  # noqa: ARG002 - DCP's signature
        """Write the list of all tensors, on rank 0."""
        super().finish(self.planner.all_tensors, results)


def _shapes(tensors: dict[str, Any]) -> list[Any]:
    """All that the plan of a save depends on: names, types, shapes, and which part of a tensor this rank holds."""
    found: list[Any] = []
    for name, tensor in tensors.items():
        part = (tensor.to_local().shape, tensor.placements, tensor.device_mesh) if isinstance(tensor, DTensor) else None
        found.append((name, getattr(tensor, "dtype", None), getattr(tensor, "shape", None), part))
    return found


def _least(word: int, group: Any) -> int:
    """The least of all ranks' words."""
    if group is None:
        return word
    box = torch.tensor(word)
    dist.all_reduce(box, op=dist.ReduceOp.MIN, group=group)
    return int(box)
