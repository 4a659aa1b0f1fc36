"""What a job decides by the files of its run, as a program: no verb of the command line does it."""

import os
from pathlib import Path

from tarflow.cluster.errors import ClusterError
from tarflow.errors import UserError


def _in_job(rank: int = 0) -> None:
    os.environ |= {
        "SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1", "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": str(rank), "SLURMD_NODENAME": "node2",
    }  # fmt: skip


def requeue() -> int:
    """The end of a start that failed: requeue, or end the chain."""
    _in_job()
    from tarflow.cluster.job.chain import Limits, Outcome
    from tarflow.cluster.job.job import Job, Task

    job = Job(kind="train", run_dir="runs/one", code=".", arguments=[], resubmit="tarflow submit", limits=Limits())
    try:
        Task(job).end_first(Outcome(1, "exit code 1"))
    except SystemExit as end:
        print(f"the job leaves with {end.code}")
    except (UserError, OSError) as error:
        return _refused(error)
    return 0


def meet() -> int:
    """A task that is not the first: it has found the others' files, and asks where to meet."""
    _in_job(rank=1)
    from tarflow.cluster.job.environment import find_place
    from tarflow.cluster.job.preflight import check_shared
    from tarflow.cluster.job.rendezvous import meet

    place, folder = find_place(os.environ), Path("runs/one/slurm/starts/8-1")
    try:
        check_shared(folder, place, "node2", wait_s=1e12)
        print(meet(folder, place, wait_s=1))
    except (ClusterError, OSError) as error:
        return _refused(error)
    return 0


def _refused(error: Exception) -> int:
    import sys

    print(f"job 8: error: {error}", file=sys.stderr)
    return 2
