"""All ranks write their part of a checkpoint into one directory: it must be the same one for all of them."""

import os
import time
from pathlib import Path

import torch.distributed as dist

from tarflow.trainer.errors import TrainerError
from tarflow.trainer.parallel.world import broadcast
from tarflow.trainer.run_dir import is_run, run_id

PATIENCE_S = 10.0  # a network file system may show another node's new file late


def check_shared(run_dir: Path, patience_s: float = PATIENCE_S) -> None:
    """Refuse a run directory in which some rank does not see the run that rank 0 has just created. Every rank calls it."""
    if not dist.is_initialized():
        return
    wanted = broadcast(run_id(run_dir) if dist.get_rank() == 0 else None)
    end = time.monotonic() + patience_s
    while not (seen := is_run(run_dir) and run_id(run_dir) == wanted) and time.monotonic() < end:
        time.sleep(0.2)
    answers: list[tuple[bool, str]] = [(False, "")] * dist.get_world_size()
    dist.all_gather_object(answers, (seen, f"{os.uname().nodename}:{run_dir.resolve()}"))
    apart = [f"rank {rank} ({place})" for rank, (sees, place) in enumerate(answers) if not sees]
    if apart:
        raise TrainerError(
            f"the run directory {run_dir} is not the same place for all ranks: {', '.join(apart[:4])}"
            f"{f' and {len(apart) - 4} more' if len(apart) > 4 else ''} do not see what rank 0 made in {answers[0][1]}. All "
            "ranks write checkpoints into it: give --run-dir a path on storage that every node shares"
        )
