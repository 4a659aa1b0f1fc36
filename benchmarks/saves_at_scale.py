"""What rank 0 of 128 has to do for a save and for a resume, on one machine without a cluster.

- A save: 128 ranks are threads, whose collectives go through memory; counted are the bytes of pickled objects that rank 0
  sends or receives, and the items (a piece of a tensor: planned, or written, or listed) in them. Three ways: torch's
  distributed checkpoint as it is, with its own cache of plans, and ours. Ours, at its second save, must exchange none.
- The list of the pieces: seconds to read it, against Python's own unpickler on the same bytes in the same run.
- A resume: bytes that the busiest of four ranks reads to know that a checkpoint is whole, and seconds by one and by four
  processes (which share this machine's cores).
"""

import io
import multiprocessing
import pickle
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.common import Bar, finish, parse_args
from benchmarks.data_images import scratch
from tarflow.trainer.checkpoint import commit as ckpt
from tarflow.trainer.checkpoint.layout import Layout
from tarflow.trainer.checkpoint.marker import Checkpoint, damage
from tarflow.trainer.checkpoint.metadata import read_metadata
from tarflow.trainer.run_dir import create_run

RANKS = 128
READERS = 4


class Group:
    """A process group whose ranks are threads. Counts what its first rank handles."""

    def __init__(self) -> None:
        self.bytes = self.items = 0
        self._barrier = threading.Barrier(RANKS)
        self._slots: list[Any] = [None] * RANKS
        self._rank = threading.local()

    def run(self, work: Callable[[int], None]) -> None:
        """Call `work` on every rank; raises what failed."""
        failures: list[BaseException] = []

        def one(rank: int) -> None:
            self._rank.number = rank
            try:
                work(rank)
            except BaseException as error:  # noqa: BLE001 - the others wait for this one
                failures.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def counts(self) -> tuple[int, int]:
        """(bytes, items) since the last call."""
        counted = self.bytes, self.items
        self.bytes = self.items = 0
        return counted

    def rank(self, *_: Any) -> int:
        """The rank of this thread."""
        return int(self._rank.number)

    def _handled(self, value: Any) -> bytes:
        """Count an object that rank 0 sends or receives."""
        data = pickle.dumps(value)
        self.bytes += len(data)
        self.items += _items(value)
        return data

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self.rank()] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values

    def gather_object(self, obj: Any, object_gather_list: list[Any] | None, **_: Any) -> None:
        """Collect objects on rank 0."""
        values = self._exchange(obj)
        if object_gather_list is not None:
            object_gather_list[:] = [pickle.loads(self._handled(value)) for value in values]  # noqa: S301 -- ours

    def scatter_object_list(
        self, scatter_object_output_list: list[Any], scatter_object_input_list: list[Any] | None, **_: Any
    ) -> None:
        """Give each rank its object."""
        values = self._exchange(scatter_object_input_list)[0]
        if self.rank() == 0:
            for value in values:
                self._handled(value)
        scatter_object_output_list[0] = values[self.rank()]

    def broadcast_object_list(self, object_list: list[Any], **_: Any) -> None:
        """Give each rank the first one's object."""
        object_list[0] = self._exchange(object_list[0])[0]
        if self.rank() == 0:
            self._handled(object_list[0])

    def all_reduce(self, tensor: torch.Tensor, **_: Any) -> None:
        """The least of all ranks' values."""
        values = self._exchange(int(tensor))
        if self.rank() == 0:
            self.bytes += 8 * RANKS
        tensor.fill_(min(values))

    def in_place(self) -> Any:
        """Let torch's functions be these while entered."""
        names = ("gather_object", "scatter_object_list", "broadcast_object_list", "all_reduce")
        return mock.patch.multiple(
            dist, is_initialized=lambda: True, get_rank=self.rank, get_world_size=lambda *_: RANKS,
            get_global_rank=lambda _, rank: rank, get_backend=lambda *_: "threads",
            **{name: getattr(self, name) for name in names},
        )  # fmt: skip


def _items(value: Any) -> int:
    if isinstance(value, SavePlan):
        return len(value.items)
    if isinstance(value, Metadata):
        return len(value.storage_data or ())
    return len(value) if isinstance(value, list) else 0


def sharded_states(tensors: int) -> list[dict[str, DTensor]]:
    """The state of each rank: its rows of some tensors, under names as long as a model's."""
    states: list[dict[str, DTensor]] = []
    hook = sys.excepthook
    for rank in range(RANKS):
        dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
        mesh = init_device_mesh("cpu", (RANKS,))
        states.append(
            {
                f"optim/exp_avg/blocks.{number // 8}.layers.{number % 8}.attention.qkv.weight": DTensor.from_local(
                    torch.full((1, 4), float(rank)), mesh, [Shard(0)], run_check=False
                )
                for number in range(tensors)
            }
        )
        dist.destroy_process_group()
    sys.excepthook = hook  # torch puts a rank before each line, for each group there was
    return states


def ways() -> dict[str, Callable[[Path, Any, Any, int], object]]:
    """How a rank saves: (folder, state, group, rank)."""

    def cached(folder: Path, state: Any, group: Any, rank: int) -> None:
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = f"rank {rank}"  # its caches are one for the process
        dcp.save(dict(state), storage_writer=_files(folder), planner=planner, process_group=group)

    layouts = [Layout() for _ in range(RANKS)]
    return {
        "torch": lambda folder, state, group, _: dcp.save(
            dict(state), storage_writer=_files(folder), process_group=group
        ),
        "torch, plans cached": cached,
        "ours": lambda folder, state, group, rank: layouts[rank].save(folder, state, group),
    }


def _files(folder: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(folder, sync_files=False)


def save_twice(home: Path, states: list[Any]) -> dict[str, list[tuple[int, int]]]:
    """Way -> (bytes, items) of rank 0 at the first and at the second save."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, save in ways().items():
        group = Group()
        found[name] = []
        with group.in_place():
            for number in (1, 2):
                folder = home / f"{name}-{number}"
                group.run(partial(_save_rank, save, folder, states, group))
                found[name].append(group.counts())
        assert len({(home / f"ours-{n}/.metadata").read_bytes() for n in (1, 2)}) == 1 if name == "ours" else True
    return found


def _save_rank(save: Callable[..., object], folder: Path, states: list[Any], group: Group, rank: int) -> None:
    save(folder, states[rank], group, rank)


def reading_the_list(folder: Path) -> tuple[int, float, float]:
    """The pieces, seconds to read and check the list of them, and seconds of Python's unpickler alone."""
    data = (folder / ".metadata").read_bytes()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    began = time.process_time()
    pieces = sum(len(tensor.pieces) for tensor in read_metadata(folder, sizes).values())
    ours = time.process_time() - began
    began = time.process_time()
    pickle._Unpickler(io.BytesIO(data)).load()  # the one in Python
    return pieces, ours, time.process_time() - began


def large_checkpoint(home: Path, megabytes: int) -> Checkpoint:
    """A committed checkpoint of a file for each of 16 ranks."""
    create_run(home)
    folder = ckpt.temporary_dir(home, 1)
    Layout().save(folder, {"model/w": torch.ones(3)}, None)
    (folder / "config.yaml").write_text("")
    for rank in range(1, 17):
        (folder / f"__{rank}_0.distcp").write_bytes(bytes([rank]) * (megabytes << 16))
    return ckpt.commit(home, folder, 1, 1, {"data": "f00"})


def verify(checkpoint: Checkpoint, rank: int, ranks: int) -> int:
    """Look for damage in a rank's share; the bytes that it read."""
    read = 0

    def counting(path: Path) -> int:
        nonlocal read
        read += path.stat().st_size
        return crc32(path)

    from tarflow.files import crc32

    with mock.patch("tarflow.trainer.checkpoint.marker.crc32", counting):
        assert damage(checkpoint, rank, ranks) is None
    return read


def main() -> int:
    args = parse_args("What rank 0 of 128 does for a save and for a resume.")
    tensors, megabytes = (24, 64) if args.quick else (400, 1024)
    rows: list[tuple[Any, ...]] = []
    with scratch() as home:
        found = save_twice(home, sharded_states(tensors))
        for name, (first, second) in found.items():
            rows.append((f"save, {name}: MB through rank 0", first[0] / 1e6, second[0] / 1e6))
            rows.append((f"save, {name}: items", first[1], second[1]))
        pieces, ours, python = reading_the_list(home / "ours-2")
        rows.append(
            (f"list of {pieces:,} pieces: CPU s of Python's unpickler, of reading and checking it", python, ours)
        )
        checkpoint = large_checkpoint(home / "run", megabytes)
        began = time.perf_counter()
        whole = verify(checkpoint, 0, 1)
        alone = time.perf_counter() - began
        with multiprocessing.get_context("fork").Pool(READERS) as pool:
            began = time.perf_counter()
            shares = pool.starmap(verify, [(checkpoint, rank, READERS) for rank in range(READERS)], chunksize=1)
            together = time.perf_counter() - began
    rows.append((f"resume, {whole / 1e6:,.0f} MB: s by one process, by {READERS}", alone, together))
    rows.append((f"resume: MB read by one process, by the busiest of {READERS}", whole / 1e6, max(shares) / 1e6))
    ours_first, ours_second = found["ours"]
    bars = [
        Bar("items, second save", ours_second[1], at_most=0, reason="nothing is planned again"),
        Bar("bytes, second save / first", ours_second[0] / ours_first[0], at_most=0.01, reason="two words per rank"),
        Bar("bytes, first save / torch's", ours_first[0] / found["torch"][0][0], at_most=0.8,
            reason="the list of all pieces stays on rank 0"),
        Bar("list: reading / Python's unpickler", ours / python, at_most=0.8, reason="C, and checked"),
        Bar("resume: busiest of 4 / one", max(shares) / whole, at_most=0.27, reason="each rank reads its share"),
    ]  # fmt: skip
    assert sum(shares) == whole
    return finish(args, rows, ("what", "first / one", "second / four"), bars)


if __name__ == "__main__":
    sys.exit(main())
