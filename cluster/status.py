"""The table of runs: what they are doing, how far they are, their jobs, their last score.

What a run does is known without Slurm: from its heartbeats, its checkpoints and its metrics.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tarflow.cluster import slurm
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.exit_codes import FINISHED, IN_USE
from tarflow.cluster.job.chain import Chain
from tarflow.cluster.job.record import RunJobs, jobs_of
from tarflow.errors import UserError
from tarflow.evaluation.report.headline import find_headline
from tarflow.evaluation.report.history import Result
from tarflow.evaluation.results import read_results
from tarflow.evaluation.run_config import run_config
from tarflow.files import listed
from tarflow.outputs import styled
from tarflow.terminal import plain
from tarflow.trainer.checkpoint.commit import Checkpoint, committed
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.resilience import alive
from tarflow.trainer.run_dir import is_run

# Title -> field of a row, in the order of the table.
COLUMNS = {
    "run": "run", "state": "state", "step": "step", "images": "images", "img/s": "rate", "ETA": "eta",
    "last commit": "commit", "heartbeat": "heartbeat", "jobs": "jobs", "requeues": "requeues", "score": "score",
}  # fmt: skip
# What a narrow terminal keeps for longest comes first.
IMPORTANCE = ("run", "state", "images", "eta", "jobs", "score", "step", "rate", "commit", "heartbeat", "requeues")
STAR = "*"
# Accounting's words for a start that Slurm itself puts back into the queue.
GOES_BACK = ("PREEMPTED", "NODE_FAIL", "REQUEUED")
# How a training ended that nothing has taken up again, by the last words of its ranks.
ENDINGS = {
    None: "not started", alive.GONE: "stopped", alive.FAILED: "failed", alive.HUNG: "failed (hung)",
    alive.KILLED: "failed (killed)",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A run at one moment, as text."""

    run: str
    state: str = "-"
    step: str = "-"
    images: str = "-"
    rate: str = "-"
    eta: str = "-"
    commit: str = "-"
    heartbeat: str = "-"
    jobs: str = "-"
    requeues: str = "-"
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
    found = [_row(run, jobs, now) for run, jobs in jobs_of(list(runs)).items()]
    return [replace(row, **{name: plain(text, 4096) for name, text in vars(row).items()}) for row in found]


def job_state(state: slurm.JobState | None, chain: Chain) -> str:
    """A job's state in words: never "failed" for one that Slurm is about to start again."""
    ended = chain.ended
    if state is None or not state.state:
        unknown = "unknown" if state is None else "over"
        return ended["text"].split(":")[0].split(" at ")[0] if ended else unknown
    if state.live:
        again = state.state == "PENDING" and chain.starts
        return f"{state.state}{' (will go on)' if again else ''}{f' {state.reason}' if again and state.reason else ''}"
    if state.state in GOES_BACK and ended is None:
        return f"{state.state} (will requeue)"
    if ended is not None:
        return f"{state.state} ({ended['text'].split(':')[0].split(' at ')[0]}, exit {ended['code']})" \
            if ended["code"] else f"{state.state} ({ended['text'].split(' at ')[0]})"  # fmt: skip
    return f"{state.state} ({state.reason})" if state.state == "FAILED" else state.state


def run_state(run: Path, jobs: RunJobs, done: bool, now: float) -> str:
    """What a run is doing, in a word or two. `done`: it has all its images."""
    if alive.living_writer(run, now) is not None:
        return "running"
    trainings = [entry["job"] for entry in jobs.entries if entry.get("kind") == "train"]
    live = {jobs.states[job].state for job in trainings if job in jobs.states and jobs.states[job].live}
    if live:
        return "starting" if "RUNNING" in live else "queued"
    if done:
        return "finished"
    if any(entry["job"] in trainings for entry in jobs.unknown):
        return "unknown"
    ends = [ended for job in trainings if (ended := Chain.shown(run / "slurm", job).ended) is not None]
    ends = [ended for ended in ends if ended["code"] != IN_USE]  # it left the run to another
    since = max((beat["seen"] for beat in alive.read_heartbeats(run)), default=0.0)
    if ends and ends[-1]["code"] != FINISHED and ends[-1]["time"] >= since:  # nobody has trained it by hand since then
        return f"failed (exit {ends[-1]['code']})"
    return ENDINGS[alive.last_words(run)]


def _jobs_text(run: Path, jobs: RunJobs) -> tuple[str, str]:
    """(all jobs in the queue, or the newest training if there are none; how often that was requeued)."""
    trainings = [entry for entry in jobs.entries if entry.get("kind") == "train"]
    named = [entry for entry in jobs.entries if entry in jobs.live or entry in jobs.unknown] or trainings[-1:]
    texts = []
    for entry in named:
        state = job_state(jobs.states.get(entry["job"]), Chain.shown(run / "slurm", entry["job"]))
        texts.append(f"{'' if entry['kind'] == 'train' else 'evaluation '}{entry['job']} {state}")
    requeues = [Chain.shown(run / "slurm", entry["job"]).restarts for entry in trainings]
    return ", ".join(texts) or "-", str(sum(requeues)) if trainings else "-"


def _row(run: Path, jobs: RunJobs, now: float) -> Row:
    config, facts = _config(run), dict[str, str]()
    total = config.train.max_images if config is not None else None
    figures, newest = last_figures(run), _newest_commit(run)
    step, seen = newest_known(run, newest)
    state = run_state(run, jobs, bool(total and newest and newest.images_seen >= total), now)
    if step or seen:
        facts |= {"step": str(step), "images": f"{seen:,}" + (f" / {total:,}" if total else "")}
    if figures and state == "running":
        rate = float(figures["throughput/images_per_sec"])
        facts["rate"] = f"{rate:.0f}"
        if total and seen < total and rate > 0:
            facts["eta"] = _span((total - seen) / rate)
    if newest is not None:
        for time_ in _times([newest.path / "COMMITTED"]):
            facts["commit"] = f"step {newest.step}, {_ago(now - time_)}"
    beats = alive.read_heartbeats(run)
    if beats:
        facts["heartbeat"] = _ago(now - min(beat["seen"] for beat in beats))  # of the rank silent for longest
    facts["jobs"], facts["requeues"] = _jobs_text(run, jobs)
    if score := headline_score(run, config):
        facts["score"] = score
    return Row(run=os.path.relpath(run) if not run.is_absolute() else str(run), state=state, **facts)


def _newest_commit(run: Path) -> Checkpoint | None:
    try:
        found = committed(run)
    except (OSError, TrainerError, ValueError):
        return None
    return found[-1] if found else None


def newest_known(run: Path, newest: Checkpoint | None) -> tuple[int, int]:
    """(step, images seen) of the last line of metrics, or of the newest checkpoint if that is further."""
    known = [(newest.images_seen, newest.step)] if newest is not None else []
    for row in _rows_from_the_end(run / "metrics.jsonl"):
        if isinstance(row.get("images_seen"), int) and isinstance(row.get("step"), int):
            known.append((row["images_seen"], row["step"]))
            break
    seen, step = max(known, default=(0, 0))
    return step, seen


def last_figures(run: Path) -> dict[str, Any] | None:
    """The last line of metrics that holds figures; the file is read from its end."""
    return next((row for row in _rows_from_the_end(run / "metrics.jsonl") if "throughput/images_per_sec" in row), None)


def headline_score(run: Path, config: Config | None) -> str | None:
    """The Frechet distance of the result that stands for the run, as in its report; a star if its settings are not the
    run's own."""
    if config is None:
        return None
    headline = find_headline([Result(folder, values) for folder, values in read_results(run)], config)
    if headline is None or headline.result.distance[1] is None:
        return None
    name, distance = headline.result.distance
    return f"{name} {distance:.2f}{STAR if headline.differs else ''} @ {headline.result.values['step']}"


def _rows_from_the_end(path: Path) -> Iterable[dict[str, Any]]:
    for line in reversed(_tail(path)):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # half a line, being written
        if isinstance(row, dict):
            yield row


def _tail(path: Path, size: int = 65536) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _config(run: Path) -> Config | None:
    try:
        return run_config(run)
    except (UserError, OSError):
        return None


def _span(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes % 60:02d} h" if hours else f"{minutes}:{int(seconds) % 60:02d} min"


def _ago(seconds: float) -> str:
    return f"{_span(max(seconds, 0))} ago"


def shortened(found: Sequence[Row], width: int) -> list[Row]:
    """Rows whose runs take up a third of the width at most: the end of a path tells runs apart, and is kept."""
    most = max(width // 3, 16)
    return [row if len(row.run) <= most else replace(row, run="…" + row.run[1 - most :]) for row in found]


def fitting(found: Sequence[Row], width: int) -> list[str]:
    """Titles of the columns that say something and fit beside each other, the important ones first."""
    room, kept = width, set()
    for title in sorted(COLUMNS, key=lambda title: IMPORTANCE.index(COLUMNS[title])):
        cells = [getattr(row, COLUMNS[title]) for row in found]
        if set(cells) <= {"-"} and title != "run":
            continue
        room -= max(map(len, [title, *cells])) + 1
        if room < -1:
            break
        kept.add(title)
    return [title for title in COLUMNS if title in kept or title == "run"]


def show(paths: list[Path], every_s: float | None) -> int:
    """Print the table once, or again and again."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    def table(width: int | None) -> Group:
        found = rows(find_runs(paths))
        found = shortened(found, width) if width else found
        titles = fitting(found, width or 10**6)
        made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for title in titles:
            made.add_column(title, overflow="fold")
        for row in found:
            made.add_row(*(getattr(row, COLUMNS[title]) for title in titles))
        hidden = [title for title in fitting(found, 10**6) if title not in titles]
        notes = [f"in a wider terminal: {', '.join(hidden)}"] if hidden else []
        if "score" in titles and any(STAR in row.score for row in found):
            notes.append(f"{STAR} not under the run's own settings; `tarflow report` says which")
        return Group(made, *(Text(note, style="dim") for note in notes))

    terminal = os.isatty(1)
    console = Console(file=styled(sys.stdout), width=None if terminal else 1000, markup=False, emoji=False)
    width = console.width if terminal else None
    if every_s is None:
        console.print(table(width), highlight=False, markup=False)
        return 0
    with Live(table(width), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every_s)
                live.update(table(console.width if terminal else None), refresh=True)
        except KeyboardInterrupt:
            return 0
