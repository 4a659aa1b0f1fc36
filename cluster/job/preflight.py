"""Checks before the first step: a run that cannot work should stop within seconds and name the bad node."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tarflow.cluster.answers import answer
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.environment import Place, poll_s
from tarflow.devices import VISIBLE, visible_devices
from tarflow.errors import why
from tarflow.files import listed, write_new
from tarflow.interpreter import module_command
from tarflow.records import Record, load_record, save_record

CLOCK_TOLERANCE_S = 30.0


class Here(Record):
    """Sign of a task that has started: here-RANK.json in the folder of a start."""

    what: ClassVar[str] = "sign of a task that it has begun"
    way_out: ClassVar[str] = "the next start of the job writes another one"

    rank: int = Field(ge=0)
    node: str
    time: float = Field(ge=0)


class BadNodeError(ClusterError):
    """A node that cannot take part in the job."""

    def __init__(self, node: str, text: str) -> None:
        super().__init__(f"node {node}: {text}")
        self.node = node


def check_node(
    run_dir: Path, node: str, gpus: int, min_free_gb: float, processes: int = 1, env: Mapping[str, str] = os.environ
) -> None:
    """Check what a task sees alone: the run directory is writable and has space, the node's GPUs, its clock.

    `gpus`: of the node, as the job asked for them; `processes`: that this task starts.
    """
    probe = run_dir / "slurm" / f".probe-{node}-{os.getpid()}"
    try:
        before = time.time()
        write_new(probe, node)
        skew = probe.stat().st_mtime - before
        probe.unlink()
    except OSError as error:
        raise BadNodeError(node, f"the run directory {run_dir} cannot be written: {why(error)}") from None
    if abs(skew) > CLOCK_TOLERANCE_S:
        raise BadNodeError(node, f"its clock is {skew:+.0f} s off that of the file system of {run_dir}")
    free = shutil.disk_usage(run_dir).free / 1e9
    if free < min_free_gb:
        raise ClusterError(
            f"{run_dir} has {free:.1f} GB free, less than min_free_gb={min_free_gb} of the profile; make room or lower it"
        )
    if gpus:
        mine = gpus_of_task(gpus, processes, env)
        found = visible_gpus()
        if found is None or found < mine:
            of_task = "" if mine == gpus else f" that were given to this task ({VISIBLE}={env[VISIBLE]})"
            raise BadNodeError(node, f"{found or 'no'} of its {mine} GPUs{of_task} answer (nvidia-smi -L)")


def gpus_of_task(gpus: int, processes: int, env: Mapping[str, str] = os.environ) -> int:
    """GPUs that a task must see: all `gpus` of its node, or those that the site binds to each task.

    Raises:
        ClusterError: these are fewer than the processes that the task starts.

    """
    bound = visible_devices(env)
    if bound is None or len(bound) >= gpus:
        return gpus
    if len(bound) < processes:
        raise ClusterError(
            f"the profile asks for gpus: {gpus} on each node, but Slurm gave this task {len(bound)} ({VISIBLE}="
            f"{env[VISIBLE]!r}) for its {processes} process{'es' * (processes > 1)}: leave --gpus-per-task and --gpu-bind out "
            "of the profile, or submit without --one-task-per-node"
        )
    return len(bound)


def visible_gpus() -> int | None:
    """GPUs that this node's driver lists; None without a driver."""
    try:
        done = answer(["nvidia-smi", "-L"], 60)
    except (OSError, subprocess.SubprocessError):
        return None
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else None


def check_shared(
    folder: Path, place: Place, node: str, wait_s: float = 120.0, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Check that every task sees every other's file in the run directory, and that their clocks agree."""
    save_record(folder / f"here-{place.rank}.json", Here(rank=place.rank, node=node, time=time.time()), shared=False)
    end = time.monotonic() + wait_s
    # One task of each node looks for all, by one listing at a time: a thousand tasks that look for a thousand files each
    # would be what the file server is busy with. The others look for the first.
    missing = set(range(place.size)) if place.local_rank == 0 else {0, place.rank}
    while missing and not stopped():
        missing -= {int(path.stem.removeprefix("here-")) for path in listed(folder, "here-*.json")}
        if missing and time.monotonic() > end:
            names = [f"here-{rank}.json" for rank in sorted(missing)]
            unseen = ", ".join(names[:4] + ["..."] * (len(names) > 4))
            raise ClusterError(
                f"rank {place.rank} on node {node} cannot see {unseen} in {folder}: the tasks of these ranks did not start, or "
                "the run directory is not shared between the nodes"
            )
        time.sleep(poll_s(place.size) if missing else 0)
    if stopped():
        return
    first, own = (load_record(folder / f"here-{rank}.json", Here) for rank in (0, place.rank))
    # Tasks write their files when they start, at most wait_s apart: a larger difference is the clocks'.
    if abs(own.time - first.time) > CLOCK_TOLERANCE_S + wait_s:
        files = f"here-0.json and here-{place.rank}.json in {folder}"
        raise BadNodeError(node, f"its clock is {own.time - first.time:+.0f} s off that of node {first.node} ({files})")


def all_reduce_command(
    device: str = "auto", limit_s: float = 180.0, folder: Path = Path(), ranks_per_task: int = 1, node: str = "?"
) -> list[str]:
    """The check of devices and backends, as a process of its own: it leaves no device memory behind.

    `device`: as in train.device; `folder`: of this start, in which each task said on which node it is.
    """
    words = [device, str(limit_s), str(folder), str(ranks_per_task), node]
    return module_command("tarflow.cluster.job.all_reduce", *words, unbuffered=True)
