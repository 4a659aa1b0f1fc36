"""Ending a run on purpose: it saves first, and nothing starts it again."""

import time
from collections.abc import Callable
from pathlib import Path

from tarflow.cluster import slurm
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.chain import Chain
from tarflow.cluster.job.record import jobs_of
from tarflow.own_paths import create_empty
from tarflow.trainer.resilience.alive import living_writer


def cancel(run_dir: Path, wait_s: float, say: Callable[[str], None]) -> int:
    """Cancel the jobs of a run, all of them; 1 if one had to be ended before it had saved."""
    run_dir = run_dir.resolve()
    jobs = jobs_of([run_dir])[run_dir]
    if not jobs.entries:
        writer = living_writer(run_dir)
        by_hand = f"; the process that trains it ({writer}) ends after a save when it gets a SIGTERM" if writer else ""
        raise ClusterError(f"{run_dir} has no submitted jobs (no slurm/jobs.jsonl in it){by_hand}")
    for entry in jobs.unknown:
        say(f"not cancelled: {jobs.describe(entry)}")
    if not jobs.live:
        say("no job of this run is in the queue" if not jobs.unknown else "no other job of this run is in the queue")
        return 1 if jobs.unknown else 0
    saving = []
    # What waits goes first: else it would start when what runs is over.
    for entry in sorted(jobs.live, key=lambda entry: jobs.states[entry["job"]].state == "RUNNING"):
        job, kind = entry["job"], entry["kind"]
        create_empty(run_dir / "slurm" / f"cancel-{job}")
        if kind == "train" and jobs.states[job].state == "RUNNING":
            slurm.command("scancel", "--signal=USR2", job)  # to the steps: each task's launcher
            say(f"job {job} ({kind}) is told to save and end")
            saving.append(job)
        else:
            slurm.command("scancel", job)
            if jobs.states[job].state == "PENDING":  # nobody else will say that it is over
                Chain.load(run_dir / "slurm", job).end(0, "cancelled while it waited in the queue")
            say(f"job {job} ({kind}) cancelled")
    end = time.monotonic() + wait_s
    while saving and time.monotonic() < end:
        states = slurm.states(saving)
        for job in [j for j in saving if j in states and not states[j].live]:
            saving.remove(job)
            say(f"job {job} saved and ended")
        time.sleep(0.5 if saving else 0)
    for job in saving:
        slurm.command("scancel", job)
        say(f"job {job} did not save within {wait_s:.0f} s (--wait) and was ended; the last checkpoint stands")
    return 1 if saving or jobs.unknown else 0
