"""Which rank of how many this process is: from torchrun's variables, or alone; and small messages between the ranks.

An incomplete set of variables is an error that names the missing ones: a guess would train alone, or wait for ever.
"""

import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tarflow.errors import UserError
from tarflow.trainer.errors import TrainerError

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """A process's place among the processes of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.rank == 0


def world_from_env(env: Mapping[str, str] = os.environ) -> World:
    """The world that torchrun (or a job launcher that sets the same variables) describes; alone if it says nothing."""
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return World()
    missing = [name for name in VARIABLES if name not in env]
    if missing:
        raise TrainerError(
            f"the environment describes a distributed run only in part: {', '.join(missing)} not set; "
            "start through torchrun or `tarflow submit`, or unset RANK and WORLD_SIZE to run alone"
        )
    try:
        rank, size, local = (int(env[name]) for name in VARIABLES[:3])
    except ValueError:
        values = ", ".join(f"{name}={env[name]!r}" for name in VARIABLES[:3])
        raise TrainerError(f"the environment's ranks must be whole numbers: {values}") from None
    if not 0 <= rank < size or local < 0:
        raise TrainerError(f"the environment contradicts itself: RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local}")
    return World(rank, size, local)


@contextmanager
def process_group(world: World, device: torch.device, timeout_s: float, always: bool = False) -> Iterator[None]:
    """The default process group while entered (a single process has none, unless `always`)."""
    if world.size == 1 and not always:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield
    except BaseException:
        # No collective on the way out of an error: the other ranks may be gone.
        raise
    else:
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(0.2)  # gloo's threads finish; leaving at once sometimes aborts the interpreter


def broadcast(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's value on every rank; the value itself when alone."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, on every rank, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def first_decides(world: World, decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, on every rank; its error is raised on every rank, so that none is left waiting."""
    answer: T | UserError | OSError | None = None
    if world.first:
        try:
            answer = decide()
        except (UserError, OSError) as error:
            answer = error
    answer = broadcast(answer)
    if isinstance(answer, UserError | OSError):
        raise answer
    return answer  # type: ignore[return-value]


def barrier() -> None:
    """Wait for all ranks; nothing when alone."""
    if dist.is_initialized():
        dist.barrier()


class Vote:
    """The largest flag of all ranks, one step later, so that no step waits for it.

    The reduction of step k runs while step k computes and is read at step k + 1: every rank sees the same answer at the
    same step.
    """

    def __init__(self, world: World) -> None:
        # A group of its own: this small reduction must not wait behind the gradients'.
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def cast(self, flag: int) -> int:
        """Give this step's flag; returns the largest flag of the step before."""
        if self._group is None:
            return flag
        before = 0
        if self._pending is not None:
            value, work = self._pending
            work.wait()
            before = int(value)
        vote = torch.tensor(flag)
        running = dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert running is not None
        self._pending = (vote, running)
        return before
