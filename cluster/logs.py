"""What the ranks of a run's jobs have printed."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.record import submissions
from tarflow.files import listed, open_to_read

PIECE = 1 << 20  # bytes
MOST = 16 << 20  # bytes shown of a log, from its end


def log_text(run: Path, rank: int, kind: str) -> tuple[str, Iterator[str]]:
    """The log of a rank of the newest job of a kind, its stderr after its stdout, in pieces.

    Returns (note, pieces); the note is empty unless the run may have newer jobs than its damaged list names. The text is as
    the job wrote it, escape sequences included: the caller escapes them for a terminal. Logs are looked up in the run itself
    or in the sweep around it; the path in the job list is not trusted.
    """
    known = submissions(run)
    jobs = [entry for entry in known.entries if entry["kind"] == kind]
    if not jobs:
        problem = f"{known.problem} in" if known.problem else "see"
        raise ClusterError(f"{run} has no submitted {kind} job ({problem} {known.path})")
    # The newest that has started: a pending one has no log yet.
    newest = next((entry for entry in reversed(jobs) if _folder(run, entry) is not None), jobs[-1])
    job, each = newest["job"], newest["ranks_per_task"]  # the processes of a task share its log
    folder = _folder(run, newest) or run / "slurm" / "jobs"
    paths = [folder / f"{job}_{rank // each}_log.{name}" for name in ("out", "err")]
    if not any(map(_is_plain_file, paths)):
        names = [path.name.removeprefix(f"{job}_").partition("_")[0] for path in listed(folder, f"{job}_*_log.out")]
        tasks = [int(name) for name in names if name.isdecimal()]
        have = f"there are ranks 0 to {max(tasks) * each + each - 1}" if tasks else "the job has not started"
        raise ClusterError(f"job {job} has no log of rank {rank} in {folder}: {have}")
    note = f"{known.path}: {known.problem}: there may be newer jobs than {job}" if known.problem else ""
    return note, _pieces(*paths)


def _folder(run: Path, entry: dict[str, Any]) -> Path | None:
    folders = (run / "slurm" / "jobs", run.absolute().parent / "slurm" / "jobs")
    return next((folder for folder in folders if listed(folder, f"{entry['job']}_*_log.out")), None)


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _pieces(out: Path, err: Path) -> Iterator[str]:
    for path in (out, err):
        if _is_plain_file(path) and path.stat().st_size:
            if path is err:
                yield f"--- {err.name} ---\n"
            with open_to_read(path) as file:
                before = max(0, path.stat().st_size - MOST)
                if before:
                    yield f"--- the last {MOST >> 20} MiB; {before:,} bytes before them are in {path} ---\n"
                    file.seek(before)
                text = io.TextIOWrapper(file, encoding="utf-8", errors="replace")
                while piece := text.read(PIECE):
                    yield piece
