"""The loader's processes: nothing survives a kill, signals for the trainer do not touch them, ranks stay in step."""

from __future__ import annotations

import datetime
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.loader import Loader
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tests.helpers.programs import ENV, program
from tests.helpers.ranks import launch_ranks
from tests.helpers.waiting import until
from tests.helpers.warm import warm


def meet_at_every_step(data: Path, batch: int) -> int:
    """A rank that takes part in a collective at every step; the sum of all ids that both ranks saw."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    shard = BatchShard(batch, rank=rank, world_size=2)
    with Loader(DataSettings.of(data, num_workers=1), ImageShape(8), shard) as loader:
        total = torch.zeros(1, dtype=torch.int64)
        for _, found in zip(range(2 * loader.num_samples // batch), loader):
            both = found.ids.sum()
            dist.all_reduce(both)
            total += both
    dist.barrier()
    dist.destroy_process_group()
    return int(total)


def start(*arguments: object) -> subprocess.Popen[str]:
    """A consumer of two workers: see the program."""
    words = warm("tests.helpers.programs.read_slowly", *arguments)
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENV)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:  # gone before it was opened, or before it was read
        return False


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()]


@pytest.mark.case("D12")
def test_kill_9_leaves_nothing_and_the_next_run_goes_on(make_set: Callable[..., Path]) -> None:
    """Interrupted and continued runs together see each id once an epoch, with nothing left in memory or /dev/shm."""
    root = make_set([30, 1, 29])
    before = set(os.listdir("/dev/shm"))
    seen, ids = 0, []
    for _ in range(2):
        process = start(root, seen)
        assert process.stdout is not None
        consumer = int(process.stdout.readline())
        workers = children(consumer)
        assert len(workers) == 2
        for line in itertools.islice(process.stdout, 6):
            position, *found = map(int, line.split())
            assert position == seen
            seen += 4
            ids += found
        os.kill(consumer, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for pid in workers:
            until("the end of the worker of a killed trainer", lambda pid=pid: not alive(pid))  # type: ignore[misc]
    assert set(os.listdir("/dev/shm")) <= before
    with Loader(DataSettings.of(root), ImageShape(8), BatchShard(12), images_seen=48) as loader:
        ids += next(iter(loader)).ids.tolist()
    assert sorted(ids) == list(range(60))


def test_signals_for_the_trainer_do_not_end_the_workers(make_set: Callable[..., Path]) -> None:
    root = make_set([40])
    with Loader(DataSettings.of(root, num_workers=2), ImageShape(8), BatchShard(4)) as loader:
        iterator = iter(loader)
        next(iterator)
        assert len(loader.worker_pids()) == 2
        for worker in loader.worker_pids():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
                os.kill(worker, number)
        ids = [i for batch in itertools.islice(iterator, 9) for i in batch.ids.tolist()]
        assert len(set(ids)) == 36


def test_a_killed_worker_is_an_error_with_its_signal(make_set: Callable[..., Path]) -> None:
    root = make_set([40])
    with Loader(DataSettings.of(root, num_workers=1), ImageShape(8), BatchShard(4)) as loader:
        iterator = iter(loader)
        next(iterator)
        (worker,) = loader.worker_pids()
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(DataError, match=rf"data worker 0 \(process {worker}\) was killed by signal 9"):
            list(itertools.islice(iterator, 50))


def test_close_and_the_end_of_the_interpreter_end_the_workers(make_set: Callable[..., Path]) -> None:
    root = make_set([40])
    before = children(os.getpid())
    loader = Loader(DataSettings.of(root, num_workers=2), ImageShape(8), BatchShard(4))
    batch = next(iter(loader))
    assert sorted(children(os.getpid())) == sorted([*before, *loader.worker_pids()])
    assert len(loader.worker_pids()) == 2
    loader.close()
    assert children(os.getpid()) == before
    assert batch.images.sum() > 0, "a batch stays valid after close"
    process = subprocess.Popen(program("read_slowly", root, 0, "workers"), stdout=subprocess.PIPE, text=True, env=ENV)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert not any(alive(int(pid)) for pid in output.splitlines()[-1].split())


@pytest.mark.case("D12")
def test_two_jobs_at_once(make_set: Callable[..., Path]) -> None:
    a, b = make_set([20], name="a"), make_set([25], name="b")
    processes = [start(root, 0) for root in (a, b, a)]
    found: list[list[int]] = []
    for process in processes:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        lines = itertools.islice(process.stdout, 5)
        found.append([int(word) for line in lines for word in line.split()[1:]])
    for process in processes:
        process.kill()
        process.wait()
    assert found[0] == found[2]
    assert sorted(found[0]) == list(range(20))
    assert max(found[1]) >= 20


@pytest.mark.parametrize(("sizes", "batch"), [([10, 7, 1], 2), ([8], 4)])
@pytest.mark.case("D01")
def test_ranks_that_meet_at_every_step_end_together(
    make_set: Callable[..., Path], sizes: list[int], batch: int
) -> None:
    root = make_set(sizes)
    sums = launch_ranks(meet_at_every_step, 2, root, batch).values
    assert sums == [2 * sum(range(sum(sizes)))] * 2


def test_a_worker_loads_neither_torch_nor_pydantic() -> None:
    """Each would cost every worker of every rank a second, or memory, for nothing."""
    code = "import sys, tarflow.data_pipeline.loading.worker as w; print({'torch', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
