"""The table of runs: state, progress, jobs and last score.

The state of a run is known without Slurm, from its heartbeats, checkpoints and metrics. A damaged file costs only the cells
that need it, and its run's row says so.
"""

import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tarflow.cluster import slurm
from tarflow.cluster.errors import ClusterError
from tarflow.cluster.exit_codes import FINISHED, IN_USE
from tarflow.cluster.job.chain import Chain
from tarflow.cluster.job.record import FILE, JobLine, RunJobs, jobs_of
from tarflow.errors import noted
from tarflow.evaluation.report.headline import find_headline
from tarflow.evaluation.report.history import Result
from tarflow.evaluation.report.logged import read_metrics
from tarflow.evaluation.results import scan
from tarflow.evaluation.run_config import shown_config
from tarflow.files import listed
from tarflow.records import DamagedFileError
from tarflow.terminal import plain, styled
from tarflow.trainer.checkpoint.find import scan_as
from tarflow.trainer.checkpoint.marker import Checkpoint
from tarflow.trainer.config.schema import Config
from tarflow.trainer.resilience import alive
from tarflow.trainer.run_dir import has_run_file, run_id

# Title -> field of a row, in the order of the table.
COLUMNS = {
    "run": "run", "state": "state", "damaged": "damaged", "step": "step", "images": "images", "img/s": "rate", "ETA": "eta",
    "last commit": "commit", "heartbeat": "heartbeat", "jobs": "jobs", "requeues": "requeues", "score": "score",
}  # fmt: skip
# A narrow terminal drops columns from the end of this list.
IMPORTANCE = (
    "run",
    "state",
    "damaged",
    "images",
    "eta",
    "jobs",
    "score",
    "step",
    "rate",
    "commit",
    "heartbeat",
    "requeues",
)
NARROW = 80  # columns
_UNITS = {10**3: "k", 10**6: "M", 10**9: "G", 10**12: "T"}
STAR = "*"
TAIL = 65536  # bytes read from the end of metrics.jsonl
LONGEST = 1e11  # seconds; longer spans are shown as "ages"
# States in accounting of a start that Slurm itself requeues.
GOES_BACK = ("PREEMPTED", "NODE_FAIL", "REQUEUED")
# How a training ended that is not running, by the last heartbeat state of its ranks.
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
    flaws: tuple[str, ...] = ()  # one sentence for each damaged file

    @property
    def damaged(self) -> str:
        """The cell of the column `damaged`."""
        number = len(self.flaws)
        return f"{number} file{'s' * (number > 1)}" if number else "-"


def _times(paths: Iterable[Path]) -> list[float]:
    """When files were last written; a file that is just being replaced or removed is left out."""
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
        if has_run_file(path):
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
    return [replace(row, flaws=tuple(plain(flaw, 4096) for flaw in row.flaws), **_plain(row)) for row in found]


def _plain(row: Row) -> dict[str, str]:
    """The cells of a row, escaped for a terminal."""
    return {name: plain(getattr(row, name), 4096) for name in IMPORTANCE if name != "damaged"}


def job_state(state: slurm.JobState | None, chain: Chain) -> str:
    """A job's state in words; a start that Slurm is about to requeue is not called failed."""
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


def run_state(run: Path, jobs: RunJobs, done: bool, now: float, beats: list[dict[str, Any]]) -> str:
    """What a run is doing, in a word or two. `done`: it has all its images; `beats`: the heartbeats of its ranks."""
    if alive.living_writer(run, now, beats) is not None:
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
    ends = [ended for ended in ends if ended["code"] != IN_USE]  # it left the run to another process
    since = max((beat["seen"] for beat in beats), default=0.0)
    if ends and ends[-1]["code"] != FINISHED and ends[-1]["time"] >= since:  # and it was not trained by hand since
        return f"failed (exit {ends[-1]['code']})"
    return ENDINGS[alive.last_words(run, beats)]


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


def _flaws_of_jobs(run: Path, jobs: RunJobs) -> list[str]:
    """Damage in the run's list of jobs and the records of their starts."""
    path, flaws = run / "slurm" / FILE, list[str]()
    if jobs.problem:
        flaws.append(str(DamagedFileError(path, jobs.problem, JobLine.way_out, what=JobLine.what)))
    return flaws + [flaw for entry in jobs.entries if (flaw := Chain.shown(path.parent, entry["job"]).problem)]


def _row(run: Path, jobs: RunJobs, now: float) -> Row:
    # Each source is read on its own: a damaged one adds to `flaws` and leaves the cells of the others alone.
    flaws = _flaws_of_jobs(run, jobs)
    config, known = shown_config(run, flaws)
    total, facts = config.train.max_images if config is not None else None, dict[str, str]()
    logged: list[dict[str, Any]] = []
    newest: Checkpoint | None = None
    with noted(flaws):
        found = read_metrics(run, TAIL)
        logged, flaws[:] = found.rows, flaws + found.flaws
    owner = None
    with noted(flaws):
        owner = run_id(run)
    with noted(flaws):
        usable, refused = scan_as(run, owner)
        newest = usable[-1] if usable else None
        flaws += [f"{path}: {why}" for path, why in sorted(refused.items()) if why.committed]
    step, seen = newest_known(logged, newest)
    state, beats = "unknown", list[dict[str, Any]]()
    with noted(flaws):
        beats = alive.read_heartbeats(run)
        state = run_state(run, jobs, bool(total and newest and newest.images_seen >= total), now, beats)
    if jobs.problem and state not in ("running", "starting", "queued", "finished"):
        state = "unknown"  # it may be in the queue
    if step or seen:
        facts |= {"step": str(step), "images": f"{seen:,}" + (f" / {total:,}" if total else "")}
    # An ETA only makes sense while the run advances.
    rate = last_rate(logged)
    if rate is not None and state == "running":
        facts["rate"] = f"{rate:.0f}"
        if total and seen < total and rate > 0:
            facts["eta"] = _span((total - seen) / rate)
    with noted(flaws):
        if newest is not None:
            for time_ in _times([newest.path / "COMMITTED"]):
                facts["commit"] = f"step {newest.step}, {_ago(now - time_)}"
    with noted(flaws):
        flaws += [beat["flaw"] for beat in beats if "flaw" in beat]
        if beats:
            facts["heartbeat"] = _ago(now - min(beat["seen"] for beat in beats))  # of the rank silent for longest
    with noted(flaws):
        facts["jobs"], facts["requeues"] = _jobs_text(run, jobs)
    if score := headline_score(run, config if known else None, flaws):
        facts["score"] = score
    name = os.path.relpath(run) if not run.is_absolute() else str(run)
    return Row(run=name, state=state, flaws=tuple(flaws), **facts)


def newest_known(logged: Sequence[dict[str, Any]], newest: Checkpoint | None) -> tuple[int, int]:
    """(step, images seen) of the last line of metrics, or of the newest checkpoint if that is further."""
    known = [(newest.images_seen, newest.step)] if newest is not None else []
    known += [(row["images_seen"], row["step"]) for row in logged[-1:]]
    seen, step = max(known, default=(0, 0))
    return step, seen


def last_rate(logged: Sequence[dict[str, Any]]) -> float | None:
    """Images per second in the last line of metrics that knows them."""
    rates = [row["throughput/images_per_sec"] for row in logged if row.get("throughput/images_per_sec") is not None]
    return float(rates[-1]) if rates else None


def headline_score(run: Path, config: Config | None, flaws: list[str]) -> str | None:
    """The Frechet distance of the run's headline result, as in its report.

    It has a star if its settings differ from the run's own, or those are unknown.
    """
    found, damaged = scan(run)
    flaws += [flaw for flaw in damaged if flaw not in flaws]
    headline = find_headline([Result(folder, values) for folder, values in found], config)
    if headline is None or headline.result.distance[1] is None:
        return None
    name, distance = headline.result.distance
    star = STAR if headline.differs or not headline.own_known else ""
    return f"{name} {distance:.2f}{star} @ {headline.result.values['step']}"


def _span(seconds: float) -> str:
    if seconds > LONGEST:
        return "ages"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes % 60:02d} h" if hours else f"{minutes}:{int(seconds) % 60:02d} min"


def _ago(seconds: float) -> str:
    return f"{_span(max(seconds, 0))} ago"


def shortened(found: Sequence[Row], width: int) -> list[Row]:
    """Rows with paths cut to a third of the width; the end is kept, since it tells runs apart.

    Below `NARROW` columns numbers of images are rounded, too.
    """
    most = max(width // 3, 16)
    found = [replace(row, run=_end(row.run, most)) for row in found]
    return [replace(row, images=_rounded(row.images)) for row in found] if width < NARROW else found


def _end(text: str, most: int) -> str:
    """The end of a text, of at most this many columns of a terminal; some characters take two."""
    if cell_len(text) <= most:
        return text
    while cell_len(text) >= most:
        text = text[1:]
    return "…" + text


def _rounded(images: str) -> str:
    """`640,583,500 / 1,281,167,000` as `641M / 1.28G`."""
    numbers = images.replace(",", "").split(" / ")
    return " / ".join(map(_short, map(int, numbers))) if all(n.isdecimal() for n in numbers) else images


def _short(number: int) -> str:
    value = float(f"{number:.3g}")
    unit = max((u for u in _UNITS if value >= u), default=1)
    return f"{value / unit:.3g}{_UNITS.get(unit, '')}"


def fitting(found: Sequence[Row], width: int) -> list[str]:
    """Titles of the columns that are not empty and fit into the width; important ones go first."""
    room, kept = width, set()
    for title in sorted(COLUMNS, key=lambda title: IMPORTANCE.index(COLUMNS[title])):
        cells = [getattr(row, COLUMNS[title]) for row in found]
        if set(cells) <= {"-"} and title != "run":
            continue
        room -= max(map(cell_len, [title, *cells])) + 1
        if room < -1:
            break
        kept.add(title)
    return [title for title in COLUMNS if title in kept or title == "run"]


def table(found: Sequence[Row], width: int | None) -> Group:
    """The table for a terminal of this width, in which no row takes a second line; None: whole, for a pipe or a file."""
    found = shortened(found, width) if width else found
    titles = fitting(found, width or 10**6)
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title in titles:
        made.add_column(title, overflow="fold")
    for row in found:
        made.add_row(*(Text(getattr(row, COLUMNS[title])) for title in titles))
    hidden = [title for title in fitting(found, 10**6) if title not in titles]
    notes = [f"in a wider terminal: {', '.join(hidden)}"] if hidden else []
    if "score" in titles and any(STAR in row.score for row in found):
        notes.append(f"{STAR} not under the run's own settings; `tarflow report` says which")
    notes += [f"{row.run}: {flaw}" for row in found for flaw in row.flaws]
    return Group(made, *(Text(note, style="dim") for note in notes))


def show(paths: list[Path], every_s: float | None) -> int:
    """Print the table once, or every `every_s` seconds until interrupted."""
    # Into a pipe or file nothing is cut: whoever reads it searches for text.
    terminal = os.isatty(1)
    console = Console(file=styled(sys.stdout), width=None if terminal else 1000, markup=False, emoji=False)

    def current() -> Group:
        return table(rows(find_runs(paths)), console.width if terminal else None)

    if every_s is None:
        console.print(current(), highlight=False, markup=False)
        return 0
    with Live(current(), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every_s)
                live.update(current(), refresh=True)
        except KeyboardInterrupt:
            return 0
