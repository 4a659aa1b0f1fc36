"""What a job decides by the files of its run: no verb of the command line does it."""

import os
import sys
from pathlib import Path

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.chain import AttemptResult
from tarflow.errors import UserError, in_words
from tarflow.terminal import message

START = Path("runs/one/slurm/starts/8-1")
DESCRIPTION = Path("runs/one/slurm/jobs") / f"job-{'ab' * 16}.json"
DIGEST = Path("digest.txt")  # stands in the batch script, of which Slurm keeps a copy


def requeue() -> int:
    """A start that fails: requeue, or end the chain."""
    _in_job(rank=0)
    from tarflow.cluster.job.child import Signals
    from tarflow.cluster.job.description import load_job
    from tarflow.cluster.job.task import Task

    try:
        task = Task(load_job(DESCRIPTION, DIGEST.read_text(), os.environ, wait_s=0))
        task.work = lambda signals: task.notes.failure() or AttemptResult(1, "exit code 1")  # type: ignore[method-assign]
        with Signals() as signals:
            task.run(signals)
    except SystemExit as end:
        print(f"the job leaves with {end.code}")
    except (UserError, OSError) as error:
        return _refused(error)
    return 0


def meet() -> int:
    """A task that is not the first: it has found the others' files, and asks where to meet."""
    _in_job(rank=1)
    from tarflow.cluster.job import preflight
    from tarflow.cluster.job.environment import find_place
    from tarflow.cluster.job.rendezvous import meet

    place = find_place(os.environ)
    preflight.CLOCK_TOLERANCE_S = 1e9  # the others came in when the home was made
    try:
        preflight.check_shared(START, place, "node2", wait_s=1)
        print(meet(START, place, wait_s=1))
    except (UserError, ClusterError, OSError) as error:
        return _refused(error)
    return 0


def _in_job(rank: int) -> None:
    os.environ |= {
        "SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1", "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": str(rank), "SLURMD_NODENAME": "node2",
    }  # fmt: skip


def _refused(error: Exception) -> int:
    print(message(f"job 8: error: {in_words(error)}"), file=sys.stderr)  # as the front door says it
    return 2
