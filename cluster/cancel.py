"""Ending a run on purpose: it saves first, and nothing starts it again."""

import time
from collections.abc import Callable
from pathlib import Path

from tarflow.cluster import slurm
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.submission.submit import submissions


def cancel(run_dir: Path, wait_s: float, say: Callable[[str], None]) -> int:
    """Cancel the jobs of a run; 1 if one had to be ended before it had saved."""
    run_dir = run_dir.resolve()
    jobs = submissions(run_dir)
    if not jobs:
        raise ClusterError(f"{run_dir} has no submitted jobs (no slurm/jobs.jsonl in it)")
    live = {job: state for job, state in slurm.states([entry["job"] for entry in jobs]).items() if state.live}
    if not live:
        say("no job of this run is in the queue")
        return 0
    saving = []
    for entry in jobs:
        job = entry["job"]
        if job not in live:
            continue
        (run_dir / "slurm" / f"cancel-{job}").touch()
        if entry["kind"] == "train" and live[job].state == "RUNNING":
            slurm.command("scancel", "--signal=USR2", job)  # to the steps: each task's launcher
            say(f"job {job} ({entry['kind']}) is told to save and end")
            saving.append(job)
        else:
            slurm.command("scancel", job)
            say(f"job {job} ({entry['kind']}) cancelled")
    end = time.monotonic() + wait_s
    while saving and time.monotonic() < end:
        states = slurm.states(saving)
        for job in [j for j in saving if not (states.get(j) and states[j].live)]:
            saving.remove(job)
            say(f"job {job} saved and ended")
        time.sleep(0.5 if saving else 0)
    for job in saving:
        slurm.command("scancel", job)
        say(f"job {job} did not save within {wait_s:.0f} s (--wait) and was ended; the last checkpoint stands")
    return 1 if saving else 0
