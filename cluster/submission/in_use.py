"""One training job per run: a second one is refused, or waits for the first."""

from collections.abc import Sequence
from pathlib import Path

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.record import RunJobs, jobs_of, submissions
from tarflow.trainer.resilience.alive import damaged_heartbeats, living_writer

WAY_OUT = "end it with `tarflow cancel {run}`, or let the new job wait for its end with --after-running"


def jobs_to_wait_for(runs: Sequence[Path], after_running: bool) -> list[str]:
    """Training jobs of the runs in the queue, which a new one waits for; without `after_running` they are an error.

    So is a run that is being trained outside of Slurm, and a job whose state is unknown here.
    """
    found: list[str] = []
    for run, jobs in jobs_of(list(runs), "train").items():
        submissions(run).checked()
        _check_known(run, jobs)
        if jobs.live and not after_running:
            listed = "; ".join(jobs.describe(entry) for entry in jobs.live)
            raise ClusterError(f"run {run} is in the queue already: {listed}. {WAY_OUT.format(run=run)}")
        found += [entry["job"] for entry in jobs.live]
        _check_by_hand(run, jobs)
    return found


def _check_known(run: Path, jobs: RunJobs) -> None:
    if jobs.unknown:
        listed = "; ".join(jobs.describe(entry) for entry in jobs.unknown)
        raise ClusterError(
            f"run {run} may be in use: {listed}. Submit where it can be asked about; if it is over, remove its line from "
            f"{run / 'slurm' / 'jobs.jsonl'}"
        )


def _check_by_hand(run: Path, jobs: RunJobs) -> None:
    """Refuse a run that is being trained by a process of none of its jobs."""
    writer = living_writer(run)
    if writer is not None and writer.job not in [entry["job"] for entry in jobs.entries]:
        damaged = "".join(f"; {flaw}" for flaw in damaged_heartbeats(run)[:1])
        raise ClusterError(
            f"run {run} is being trained by another process ({writer}), as its heartbeats say: end that one first, or "
            f"give another --run-dir. If it was killed a moment ago, try again in a minute{damaged}"
        )
