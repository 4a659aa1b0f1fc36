"""Cancels a run: it saves first, and nothing restarts it."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tarflow.cluster import slurm
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.exit_codes import FINISHED
from tarflow.cluster.job.cancel_note import leave_note
from tarflow.cluster.job.chain import Chain
from tarflow.cluster.job.record import RunJobs, jobs_of
from tarflow.errors import UserError, why
from tarflow.trainer.resilience.alive import living_writer
from tarflow.trainer.run_dir import is_run


def cancel(run_dir: Path, wait_s: float, log: Callable[[str], None]) -> int:
    """Cancel all jobs of a run. Returns 1 if one had to be killed before it had saved, or was left alone."""
    run_dir = run_dir.resolve()
    jobs = jobs_of([run_dir])[run_dir]
    if not jobs.entries and not jobs.problem:
        writer = living_writer(run_dir)
        by_hand = f"; the process that trains it ({writer}) ends after a save when it gets a SIGTERM" if writer else ""
        raise ClusterError(f"{run_dir} has no submitted jobs (no slurm/jobs.jsonl in it){by_hand}")
    # What cannot be told to be this run's is left alone, and makes the exit code 1.
    left = [f"not cancelled: {jobs.describe(entry)}" for entry in jobs.unknown]
    if jobs.problem:
        left.append(f"{run_dir / 'slurm' / 'jobs.jsonl'}: {jobs.problem}: there may be jobs that it does not name")
    ours, others = _told_apart(run_dir, jobs)
    for text in [*left, *others]:
        log(text)
    left += others
    if not ours:
        log("no job of this run is in the queue" if not left else "no other job of this run is in the queue")
        return 1 if left else 0
    saving = []
    # Pending jobs first: otherwise they would start as soon as the running one ends.
    for entry in sorted(ours, key=lambda entry: jobs.states[entry["job"]].state == "RUNNING"):
        job, kind = entry["job"], entry["kind"]
        # The note first: it tells the task that the signal means the end, not a requeue.
        leave_note(run_dir / "slurm", job, entry["submission"])
        if kind == "train" and jobs.states[job].state == "RUNNING":
            slurm.command("scancel", "--signal=USR2", job)  # to the steps: each task's launcher
            log(f"job {job} ({kind}) is told to save and end")
            saving.append(job)
        else:
            slurm.command("scancel", job)
            if jobs.states[job].state == "PENDING":  # no task of it will ever record the end
                try:
                    Chain.load(run_dir / "slurm", job).end(
                        FINISHED, "cancelled while it waited in the queue", cancelled=True
                    )
                except (UserError, OSError) as error:
                    log(f"that job {job} is over is not noted: {why(error)}")
            log(f"job {job} ({kind}) cancelled")
    # Training saves within its step; what does not is killed, since the allocation is paid for.
    end = time.monotonic() + wait_s
    while saving and time.monotonic() < end:
        states = slurm.states(saving)
        for job in [j for j in saving if j in states and not states[j].live]:
            saving.remove(job)
            log(f"job {job} saved and ended")
        time.sleep(0.5 if saving else 0)
    for job in saving:
        slurm.command("scancel", job)
        log(f"job {job} did not save within {wait_s:.0f} s (--wait) and was ended; the last checkpoint is intact")
    return 1 if saving or left else 0


def _told_apart(run_dir: Path, jobs: RunJobs) -> tuple[list[dict[str, Any]], list[str]]:
    """The queued jobs that Slurm itself says are this run's, and a message for each of the others.

    A job list that was copied or forged names jobs that have nothing to do with this directory.
    """
    ours, others = [], []
    for entry in jobs.live:
        problem = _problem(run_dir, entry["job"])
        if problem is None:
            ours.append(entry)
        else:
            others.append(
                f"not cancelled: job {entry['job']}, which {jobs.run_dir / 'slurm' / 'jobs.jsonl'} names: {problem}"
            )
    return ours, others


def _problem(run_dir: Path, job: str) -> str | None:
    """Why a queued job is not this run's, by its owner and the folder of its log as Slurm reports them; None if it is."""
    shown = slurm.ask(["scontrol", "show", "job", job, "-o"])
    if shown is None:
        return "Slurm does not say whose it is (scontrol show job)"
    user = re.search(r"\bUserId=[^\s(]*\((\d+)\)", shown)
    if user is None or int(user[1]) != os.getuid():
        return f"it belongs to {user[0].removeprefix('UserId=') if user else 'nobody that Slurm knows'}"
    places = [run_dir] if is_run(run_dir.parent) else [run_dir, run_dir.parent]  # elements of a sweep log to its folder
    folders = [place / "slurm" / "jobs" for place in places]
    if any(f" StdOut={folder}/" in shown for folder in folders):
        return None
    log = re.search(r"\bStdOut=(/.*?)(?= \w+=|\s*$)", shown, re.MULTILINE)
    folder = Path(log[1]).parent if log else None
    if folder is not None and folder.resolve() in folders:  # submitted through another path of the same directory
        return None
    return f"it is a job of another directory (its log is in {folder or 'no place that Slurm names'})"
