"""Saves after the first one: nothing is planned again, and what lies on disk is the same as if it were."""

import errno
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tarflow.trainer.checkpoint.layout import Layout
from tarflow.trainer.checkpoint.tensors import write_tensors
from tarflow.trainer.parallel.world import process_group, world_from_env
from tests.helpers.ranks import launch_ranks

TENSORS = 12
OBJECTS = ("gather_object", "scatter_object_list", "broadcast_object_list", "all_gather_object")


@contextmanager
def counted_objects() -> Iterator[dict[str, int]]:
    """How often ranks exchange objects, which are pickled."""
    counts = dict.fromkeys(OBJECTS, 0)

    def counting(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: counting(name, getattr(dist, name)) for name in OBJECTS}):
        yield counts


def state(value: float, rows: int = 6) -> dict[str, Tensor]:
    """Sharded tensors and a whole one, all of a value."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {
        f"model/{n}": distribute_tensor(torch.full((rows, 3), value + n), mesh, [Shard(0)]) for n in range(TENSORS)
    }
    return tensors | {"optim/step": torch.tensor(value)}


def written(folder: Path, like: dict[str, Tensor]) -> dict[str, list[float]]:
    """What torch itself reads."""
    empty = {name: torch.empty(tuple(t.shape), dtype=t.dtype) for name, t in like.items()}
    dcp.load(empty, checkpoint_id=folder)
    return {name: tensor.flatten().tolist() for name, tensor in empty.items()}


def saved_again(folder: Path) -> list[int]:
    """Three saves with one layout, then one of other shapes, then one as before."""
    with process_group(world_from_env(), torch.device("cpu"), 60):
        layout, exchanged = Layout(), []
        for number, rows in enumerate((6, 6, 6, 10, 6)):
            tensors, home = state(number, rows), folder / f"{number}"
            with counted_objects() as counts:
                write_tensors(home, tensors, dist.group.WORLD, layout)
            exchanged.append(sum(counts.values()))
            dist.barrier()
            found = written(home, tensors)
            assert found["optim/step"] == [number]
            for name in range(TENSORS):
                assert found[f"model/{name}"] == [number + name] * 3 * rows
        return exchanged


def test_what_is_saved_again_is_not_planned_again(tmp_path: Path) -> None:
    for exchanged in launch_ranks(saved_again, 3, tmp_path).values:
        first, *again, other, back = exchanged
        assert first == other == back > 0
        assert again == [0, 0]  # not one object
    listed = [(tmp_path / f"{number}/.metadata").read_bytes() for number in range(5)]
    assert listed[0] == listed[1] == listed[2] == listed[4] != listed[3]


def saved_with_failures(folder: Path) -> list[str]:
    """A save that fails on the last rank while it is written, as the first one and as a later one; then good ones."""
    with process_group(world_from_env(), torch.device("cpu"), 60):
        layout, said = Layout(), []
        full = OSError(errno.ENOSPC, "no space", "x")
        for number, fails in enumerate((True, False, True, False)):
            tensors, home = state(number), folder / f"{number}"
            broken = mock.patch.object(dcp.FileSystemWriter, "write_data", side_effect=full)
            try:
                if fails and dist.get_rank() == dist.get_world_size() - 1:
                    with broken:
                        write_tensors(home, tensors, dist.group.WORLD, layout)
                else:
                    write_tensors(home, tensors, dist.group.WORLD, layout)
                said.append("")
            except BaseException as error:  # noqa: BLE001 - DCP's is not an Exception
                said.append(type(error).__name__)
            dist.barrier()
            if not fails:
                assert written(home, tensors)["model/0"] == [number] * 18
            else:
                assert not (home / ".metadata").exists()
        return said


def test_a_save_that_fails_on_one_rank_leaves_the_next_one_whole(tmp_path: Path) -> None:
    first, _, last = launch_ranks(saved_with_failures, 3, tmp_path).values
    assert first == ["CheckpointException", "", "", ""]  # whoever calls learns of the third from the last rank
    assert last == ["CheckpointException", "", "OSError", ""]


def test_the_list_of_tensors_names_no_folder_and_is_not_sent_to_all_ranks(tmp_path: Path) -> None:
    writes: list[bytes] = []
    real = dist.broadcast_object_list

    def listening(*args: Any, **kwargs: Any) -> Any:
        writes.append(pickle.dumps(args[0] if args else kwargs["object_list"]))
        return real(*args, **kwargs)

    alone = process_group(world_from_env({}), torch.device("cpu"), 60, always=True)
    with alone, mock.patch.object(dist, "broadcast_object_list", listening):
        write_tensors(tmp_path / "here", state(1.0), dist.group.WORLD)
    assert writes
    assert not any(b"model/3" in sent for sent in writes)
    assert str(tmp_path).encode() not in (tmp_path / "here/.metadata").read_bytes()


@pytest.mark.parametrize("value", [torch.tensor(3.0), torch.arange(6, dtype=torch.int64)])
def test_a_layout_serves_without_other_ranks(tmp_path: Path, value: Tensor) -> None:
    layout = Layout()
    for number in range(2):
        write_tensors(tmp_path / f"{number}", {"x": value + number}, None, layout)
        assert written(tmp_path / f"{number}", {"x": value})["x"] == (value + number).flatten().tolist()
