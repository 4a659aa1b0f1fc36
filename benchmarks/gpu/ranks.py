"""What takes several ranks: gathering weights from others, and a checkpoint that another number of ranks reads.

One rank for each GPU of the machine, in processes forked from this one before it touches a GPU itself.
"""

import multiprocessing
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import Bar
from benchmarks.gpu.bench import Bench, Figures, Steps
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.tensors import read_tensors
from tarflow.trainer.config.schema import CheckpointConfig
from tarflow.trainer.parallel.memory import rank_memory
from tarflow.trainer.parallel.saved import whole
from tarflow.trainer.parallel.world import World
from tarflow.trainer.run_dir import create_run
from tarflow.trainer.saving.async_writer import AsyncWriter
from tarflow.trainer.saving.handle import Position, SaveHandle
from tarflow.trainer.saving.staging import Staging

LIMIT_S = 300.0
# (reshard_after_forward, prefetch_units, layers_per_unit)
WAYS = (("never", 0, 0), ("always", 0, 0), ("always", 0, 1), ("always", 2, 1), ("never", 0, 1))
Job = Callable[[Bench, World], Figures]


def ranks_here(bench: Bench) -> int:
    """One for each GPU; two in a dry run. With one alone, what several show is named as left out."""
    if bench.tiny:
        return 2
    count = torch.cuda.device_count()
    if count < 2:
        bench.left_out.append(f"several ranks: this machine has {count} GPU")
    return count


def in_ranks(bench: Bench, count: int, job: Job) -> Figures:
    """Run a job in `count` processes that form a group; what rank 0 returns."""
    assert not torch.cuda.is_initialized(), "a process that has used a GPU cannot be forked"
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        processes = [
            context.Process(
                target=_rank, args=(bench, World(rank, count, rank), f"{folder}/store", job, pipes[rank][1])
            )
            for rank in range(count)
        ]
        for process, (_, theirs) in zip(processes, pipes):
            process.start()
            theirs.close()
        try:
            answers = [_answer(ours, rank) for rank, (ours, _) in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(10)
                process.kill()
    return answers[0]


def _answer(pipe: Connection, rank: int) -> Figures:
    try:
        if not pipe.poll(LIMIT_S):
            raise RuntimeError(f"rank {rank} gave no answer within {LIMIT_S:g} s")
        answer, problem = pipe.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died") from None
    if problem:
        raise RuntimeError(f"rank {rank}: {problem}")
    found: Figures = answer
    return found


def _rank(bench: Bench, world: World, store: str, job: Job, pipe: Connection) -> None:
    try:
        if bench.tiny:
            torch.set_num_threads(1)
        else:
            bench.device = torch.device("cuda", world.local_rank)
            torch.cuda.set_device(bench.device)
        dist.init_process_group(
            "gloo" if bench.tiny else "cpu:gloo,cuda:nccl", store=dist.FileStore(store, world.size), rank=world.rank,
            world_size=world.size, timeout=timedelta(seconds=120),
        )  # fmt: skip
        pipe.send((job(bench, world), ""))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - said by the process that waits
        pipe.send(({}, traceback.format_exc()[-2000:]))


def gathering(bench: Bench) -> Figures:
    """Steps by what becomes of gathered weights and how far ahead they are gathered: time, memory, the same gradients."""
    count = ranks_here(bench)
    if count < 2:
        return {}
    figures = in_ranks(bench, count, _ways)
    norms = [way["norm"] for way in figures.values()]
    for name, way in figures.items():
        bench.bars.append(Bar(f"gradient norm, {name}", abs(way["norm"] / norms[0] - 1), at_most=1e-2))
        if bench.on_gpu("memory against the plan"):
            over = way["peak GB"] / way["cost model GB"]
            bench.bars.append(Bar(f"peak over the cost model, {name}", over, at_most=1.1))
    return {"ranks": count, **figures}


def _ways(bench: Bench, world: World) -> Figures:
    figures: Figures = {}
    for reshard, ahead, unit in WAYS:
        bench.fresh()
        parallel: dict[str, Any] = {"reshard_after_forward": reshard, "prefetch_units": ahead, "layers_per_unit": unit}
        steps = Steps(bench, compiled=not bench.tiny, world=world, dp_shard=world.size, **parallel)
        steps.take(0)
        steps.take(1)
        norm = float(steps.backend.optimizer.grad_norm)
        seconds, host = steps.seconds(2, 6)
        name = f"reshard_after_forward {reshard}, prefetch_units {ahead}, {unit or 'all'} layers a unit"
        figures[name] = {"ms": seconds * 1e3, "host ms": host * 1e3, "norm": norm, "peak GB": bench.peak_gb(),
                         "cost model GB": rank_memory(steps.config, world.size).total / 1e9}  # fmt: skip
        del steps
    return figures


def resharding(bench: Bench) -> Figures:
    """A checkpoint of all ranks is read by one: every tensor to the bit."""
    count = ranks_here(bench)
    if count < 2:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        create_run(run)
        saved = in_ranks(bench, count, partial(_save, run=run))
        read = in_ranks(bench, 1, partial(_read, run=run))
    differing = sum(saved["sums"][name] != read["sums"].get(name) for name in saved["sums"])
    bench.bars.append(Bar("tensors that one rank reads otherwise than several wrote them", differing, at_most=0))
    return {"ranks": count, "tensors": len(saved["sums"]), "save s": saved["seconds"], "read s": read["seconds"]}


def _save(bench: Bench, world: World, run: Path) -> Figures:
    steps = Steps(bench, world=world, dp_shard=world.size)
    steps.take(0)
    state = steps.backend.state() | steps.ema.state()
    writer, save = AsyncWriter(run, CheckpointConfig()), SaveHandle(Position(8, 1))
    writer.start(save, Staging().copy(state), lambda: ("{}", {}))
    save.wait()
    if save.error:
        raise RuntimeError(save.error)
    return {"sums": _sums(state), "seconds": save.seconds}


def _read(bench: Bench, world: World, run: Path) -> Figures:
    steps = Steps(bench, world=world)
    state = steps.backend.state() | steps.ema.state()
    began = time.perf_counter()
    read_tensors(find(run), state)
    return {"seconds": time.perf_counter() - began, "sums": _sums(state)}


def _sums(state: dict[str, Tensor]) -> dict[str, int]:
    """A checksum of every whole tensor. Every rank calls it."""
    return {name: zlib.crc32(whole(t).cpu().contiguous().numpy().tobytes()) for name, t in state.items()}
