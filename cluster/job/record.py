"""The jobs of a run, as submission noted them: RUN/slurm/jobs.jsonl, a line for each, oldest first."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tarflow.cluster import slurm
from tarflow.cluster.job.chain import Chain
from tarflow.files import append_json_line, read_json_lines


def submissions(run_dir: Path) -> list[dict[str, Any]]:
    """Jobs that were submitted for a run, oldest first."""
    return read_json_lines(run_dir / "slurm" / "jobs.jsonl")


def note_job(run_dir: Path, kind: str, job: str, logs: Path, **more: Any) -> None:
    """Note a job in its run. `logs`: submitit's folder; a sweep's elements share one."""
    entry: dict[str, Any] = {"job": job, "kind": kind, "time": time.time(), "logs": str(logs)}
    entry |= {"cluster": slurm.cluster_name(), "host": os.uname().nodename}
    append_json_line(run_dir / "slurm" / "jobs.jsonl", entry | more)


@dataclass
class RunJobs:
    """The jobs of a run by what is known of them."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    states: dict[str, slurm.JobState] = field(default_factory=dict)  # of those that Slurm was asked about
    elsewhere: dict[str, str] = field(default_factory=dict)  # job -> another cluster, which cannot be asked from here
    run_dir: Path = Path()

    @property
    def live(self) -> list[dict[str, Any]]:
        """Jobs in the queue: running or waiting."""
        return [e for e in self.entries if (state := self.states.get(e["job"])) is not None and state.live]

    @property
    def unknown(self) -> list[dict[str, Any]]:
        """Jobs that Slurm cannot be asked about, and whose own record has no end."""
        asked = [e for e in self.entries if e["job"] not in self.states]
        return [e for e in asked if Chain.load(self.run_dir / "slurm", e["job"]).ended is None]

    def describe(self, entry: dict[str, Any]) -> str:
        """A job in words: what it is, and what is known of it."""
        job = entry["job"]
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(entry.get("time", 0))))
        source = f"submitted {since}" + (f" on {entry['host']}" if entry.get("host") else "")
        if (state := self.states.get(job)) is not None:
            where = f" on {state.nodes}" if state.nodes else ""
            return f"{entry['kind']} job {job} ({state.state or 'not in the queue'}{where}, {source})"
        why = f"it belongs to the cluster {self.elsewhere[job]}" if job in self.elsewhere else "squeue does not answer"
        return f"{entry['kind']} job {job} ({source}; whether it runs is not known here: {why})"


def jobs_of(run_dirs: list[Path], kind: str | None = None) -> dict[Path, RunJobs]:
    """The jobs of each run, with one question to Slurm for all. A number means a job of the cluster that gave it."""
    found = {run_dir: RunJobs(run_dir=run_dir) for run_dir in run_dirs}
    for run_dir, jobs in found.items():
        jobs.entries = [e for e in submissions(run_dir) if "job" in e and kind in (None, e.get("kind"))]
    here = slurm.cluster_name() if any(e.get("cluster") for j in found.values() for e in j.entries) else None
    for jobs in found.values():
        for entry in jobs.entries:
            if here and entry.get("cluster") not in (None, here):
                jobs.elsewhere[entry["job"]] = entry["cluster"]
    states = slurm.states([e["job"] for j in found.values() for e in j.entries if e["job"] not in j.elsewhere])
    for jobs in found.values():
        ours = [e["job"] for e in jobs.entries if e["job"] not in jobs.elsewhere]
        jobs.states = {job: states[job] for job in ours if job in states}
    return found
