"""The table of runs: what Slurm says of their jobs, and what their own files say of how far they are."""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflow.cluster import slurm
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.chain import Chain
from tarflow.cluster.submission.submit import submissions
from tarflow.files import listed
from tarflow.trainer.checkpoint.commit import committed
from tarflow.trainer.config.files import load_config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import is_run

COLUMNS = ("run", "job", "Slurm", "step", "images", "img/s", "ETA", "last commit", "heartbeat", "restarts", "score")
# Accounting's words for a start that Slurm itself puts back into the queue.
GOES_BACK = ("PREEMPTED", "NODE_FAIL", "REQUEUED")


@dataclass(frozen=True)
class Row:
    """A run at one moment, as text."""

    run: str
    job: str = "-"
    state: str = "-"
    step: str = "-"
    images: str = "-"
    rate: str = "-"
    eta: str = "-"
    commit: str = "-"
    heartbeat: str = "-"
    restarts: str = "-"
    score: str = "-"


def _times(paths: Iterable[Path]) -> list[float]:
    """When files were last written; one that its writer replaces or removes at this moment is left out."""
    times = []
    for path in paths:
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return times


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Runs among the paths, and the runs (sweeps' too) in those that are folders of runs."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ClusterError(f"no run directory at {path}")
        if is_run(path):
            found.append(path)
            continue
        inside = [p for pattern in ("*/run.json", "*/*/run.json") for p in listed(path, pattern)]
        if not inside:
            raise ClusterError(f"{path} is not a run and holds none")
        found += [p.parent for p in inside]
    return list(dict.fromkeys(found))


def rows(runs: Iterable[Path], now: float | None = None) -> list[Row]:
    """One row for each run."""
    now = time.time() if now is None else now
    runs = list(runs)
    jobs = {run: submissions(run) for run in runs}
    states = slurm.states([entry["job"] for entries in jobs.values() for entry in entries])
    return [_row(run, jobs[run], states, now) for run in runs]


def job_state(job: str, state: slurm.JobState | None, chain: Chain) -> str:
    """A job's state in words: never "failed" for one that Slurm is about to start again."""
    if state is None:
        return chain.ended["text"].split(":")[0].split(" at ")[0] if chain.ended else "unknown"
    if state.live:
        again = state.state == "PENDING" and chain.starts
        return f"{state.state}{' (will go on)' if again else ''}{f' {state.reason}' if again and state.reason else ''}"
    if state.state in GOES_BACK and chain.ended is None:
        return f"{state.state} (will requeue)"
    if chain.ended is not None:
        return f"{state.state} ({chain.ended['text'].split(':')[0].split(' at ')[0]}, exit {chain.ended['code']})" \
            if chain.ended["code"] else f"{state.state} ({chain.ended['text'].split(' at ')[0]})"  # fmt: skip
    return f"{state.state} ({state.reason})" if state.state == "FAILED" else state.state


def _row(run: Path, jobs: list[dict[str, Any]], states: dict[str, slurm.JobState], now: float) -> Row:
    trains = [entry["job"] for entry in jobs if entry["kind"] == "train"]
    job = trains[-1] if trains else None
    chain = Chain.load(run / "slurm", job) if job else None
    facts: dict[str, str] = {}
    figures = last_figures(run)
    total = _total(run)
    if figures:
        seen, rate = int(figures["images_seen"]), float(figures["throughput/images_per_sec"])
        facts |= {"step": f"{figures['step']}", "rate": f"{rate:.0f}"}
        facts["images"] = f"{seen:,}" + (f" / {total:,}" if total else "")
        if total and seen < total and rate > 0 and now - float(figures["time"]) < 3600:
            facts["eta"] = _span((total - seen) / rate)
        elif total and seen >= total:
            facts["eta"] = "done"
    try:
        newest = committed(run)[-1:]
    except (OSError, TrainerError, ValueError):
        newest = []
    for checkpoint in newest:
        for time_ in _times([checkpoint.path / "COMMITTED"]):
            facts["commit"] = f"step {checkpoint.step}, {_ago(now - time_)}"
    beats = _times(listed(run / "heartbeats", "rank-*.json"))
    if beats:
        facts["heartbeat"] = _ago(now - min(beats))  # of the rank that has been silent for longest
    if job and chain is not None:
        facts |= {"job": job, "state": job_state(job, states.get(job), chain), "restarts": str(chain.restarts)}
    if score := last_score(run):
        facts["score"] = score
    return Row(run=os.path.relpath(run) if not run.is_absolute() else str(run), **facts)


def last_figures(run: Path) -> dict[str, Any] | None:
    """The last line of metrics that holds figures; the file is read from its end."""
    for line in reversed(_tail(run / "metrics.jsonl")):
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # half a line, being written
        if "throughput/images_per_sec" in entry:
            return dict(entry)
    return None


def last_score(run: Path) -> str | None:
    """The Frechet distance of the newest evaluated checkpoint."""
    for line in reversed(_tail(run / "evals.jsonl")):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        flat = entry | entry.get("metrics", {})
        for key, value in flat.items():
            name = key.removeprefix("eval/")
            if (name == "fid" or name.startswith("fd_")) and isinstance(value, int | float):
                return f"{name} {value:.2f}" + (f" @ {entry['step']}" if "step" in entry else "")
    return None


def _tail(path: Path, size: int = 65536) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _total(run: Path) -> int | None:
    try:
        return load_config(run / "config.yaml").train.max_images
    except (TrainerError, OSError):
        return None


def _span(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes % 60:02d} h" if hours else f"{minutes}:{int(seconds) % 60:02d} min"


def _ago(seconds: float) -> str:
    return f"{_span(max(seconds, 0))} ago"


def show(paths: list[Path], every_s: float | None) -> int:
    """Print the table once, or again and again."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    def table() -> Table:
        made = Table(box=None, pad_edge=False, header_style="bold")
        for name in COLUMNS:
            made.add_column(name, overflow="fold")
        for row in rows(find_runs(paths)):
            made.add_row(*vars(row).values())
        return made

    console = Console(width=None if os.isatty(1) else 220)
    if every_s is None:
        console.print(table(), highlight=False, markup=False)
        return 0
    with Live(table(), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every_s)
                live.update(table(), refresh=True)
        except KeyboardInterrupt:
            return 0


def log_text(run: Path, rank: int, kind: str) -> str:
    """What a rank of the newest job of a kind has printed, with its errors after it."""
    jobs = [entry for entry in submissions(run) if entry["kind"] == kind]
    if not jobs:
        raise ClusterError(f"{run} has no submitted {kind} job (see {run / 'slurm' / 'jobs.jsonl'})")
    job, folder = jobs[-1]["job"], Path(jobs[-1]["logs"])
    each = jobs[-1].get("ranks_per_task", 1)  # the processes of a task share its log
    out, err = (folder / f"{job}_{rank // each}_log.{name}" for name in ("out", "err"))
    if not out.exists() and not err.exists():
        tasks = [int(p.name.removeprefix(f"{job}_").split("_")[0]) for p in folder.glob(f"{job}_*_log.out")]
        have = f"there are ranks 0 to {max(tasks) * each + each - 1}" if tasks else "the job has not started"
        raise ClusterError(f"job {job} has no log of rank {rank} in {folder}: {have}")
    text = out.read_text(errors="replace") if out.exists() else ""
    errors = err.read_text(errors="replace") if err.exists() else ""
    return text + (f"--- {err.name} ---\n{errors}" if errors.strip() else "")
