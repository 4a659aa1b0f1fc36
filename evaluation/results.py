"""Results on disk: one directory per checkpoint and settings, written once (contract 9).

evals/images-000000016000/              the run's own settings, by the checkpoint's name
evals/images-000000016000-0123456789ab/ other settings, by their hash
    result.json  every figure and every setting; the same bytes whoever did the work
    work.json    who did it, when, how long it took
evals/weights-0123456789ab-.../         of a weights file
evals/work/                             chunks of results in the making
evals.jsonl                             one line per result; TensorBoard has the same figures
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tarflow.errors import UserError, noted
from tarflow.evaluation.event_file import append_events
from tarflow.evaluation.metrics.names import is_distance, is_kernel
from tarflow.evaluation.result_file import FORMAT, RESULT, WORK, load_result, load_work
from tarflow.files import discard, free_name, listed, make_folder, publish_dir
from tarflow.records import DamagedFileError, append_record_line, read_lines
from tarflow.trainer.checkpoint.names import leading_name
from tarflow.trainer.run_dir import has_run_file, is_run, run_id

__all__ = [
    "FORMAT", "RESULT", "WORK", "announce", "building", "evals_dir", "headline", "metrics", "publish", "read_result",
    "read_results", "result_name", "scan", "set_damaged_aside", "summary", "supersede", "sweep", "usable_result",
    "work_dir",
]  # fmt: skip
EVALS = "evals.jsonl"
SCORES = (
    "distance_stderr", "kernel_stderr", "precision", "recall", "density", "coverage", "inception_score",
)  # fmt: skip
SUMMARY = ("run", "step", "images_seen", "weights", "status", "num_samples", "nonfinite", "settings_hash", "time")


def evals_dir(run_dir: Path) -> Path:
    return run_dir / "evals"


def work_dir(run_dir: Path, key: str) -> Path:
    """Where the chunks of a result in the making lie."""
    return evals_dir(run_dir) / "work" / key


def result_name(run_dir: Path, checkpoint: str, settings_hash: str, own: bool) -> str:
    """Name of the directory of a checkpoint's result: the checkpoint's for the run's own settings, otherwise with their hash.

    If the run's own settings changed after a checkpoint was evaluated, the new result stands beside the old one.
    """
    if own:
        there = usable_result(evals_dir(run_dir) / checkpoint)
        if there is None or there["settings_hash"] == settings_hash:
            return checkpoint
    return f"{checkpoint}-{settings_hash}"


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result in a directory below `evals/`, with what is said about the work, or None if there is none.

    Raises DamagedFileError for one that cannot be believed.
    """
    root = folder.parent.parent
    try:
        result = load_result(folder, run_id(root) if is_run(root) else None)
    except FileNotFoundError:
        return None
    work: dict[str, Any] = {}
    with suppress(UserError, OSError):  # no figure depends on it, and without its time more is looked at, not less
        work = load_work(folder)
    return {"seconds": {}, **work, **result}


def usable_result(folder: Path) -> dict[str, Any] | None:
    """The same, but None also for a damaged one: it is no result, and its place is free (see `set_damaged_aside`)."""
    try:
        return read_result(folder)
    except DamagedFileError as error:
        if error.path.parent != folder:
            raise
        return None


def scan(root: Path) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """All results of a run with their directories, by images seen and name; and what is damaged, in words."""
    found: list[tuple[Path, dict[str, Any]]] = []
    flaws: list[str] = []
    run = None
    with noted(flaws):
        run = run_id(root) if has_run_file(root) else None
    for path in listed(evals_dir(root)):
        if not (leading_name(path.name) or path.name.startswith("weights-")):
            continue
        result, work = None, dict[str, Any]()
        with (
            noted(flaws),
            suppress(FileNotFoundError),
        ):  # being removed, or never finished: nobody takes it for a result
            result = load_result(path, run)
        with noted(flaws):
            work = load_work(path)
        if result is not None:
            found.append((path, {"seconds": {}, **work, **result}))
    with noted(flaws):
        flaws += _announced(root, run)[1]
    return sorted(found, key=lambda item: (item[1]["images_seen"] or 0, item[0].name)), flaws


def read_results(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The results of a run that can be believed; see `scan`."""
    return scan(root)[0]


@contextmanager
def building(run_dir: Path, name: str) -> Iterator[Path]:
    """A directory to build a result in; whatever ends the block, nothing half-written stays under evals/."""
    folder = make_folder(run_dir, evals_dir(run_dir).name)
    temporary = folder / f".{name}.{os.uname().nodename}.{os.getpid()}.{uuid.uuid4().hex[:6]}.tmp"
    temporary.mkdir()
    try:
        yield temporary
    finally:
        discard(temporary)


def sweep(run_dir: Path) -> None:
    """Remove what evaluations of this machine that were killed left behind."""
    for path in listed(evals_dir(run_dir), f".*.{os.uname().nodename}.*.tmp"):
        pid = path.name.split(".")[-3]
        if pid.isdigit() and Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists():
            discard(path)
    for path in listed(work_dir(run_dir, "")):
        name = path.name.rsplit("-", 2)[0]
        result = usable_result(evals_dir(run_dir) / name)
        published = result and path.name == f"{name}-{result['settings_hash']}-{result['weights_sha256'][:12]}"
        checkpoint = leading_name(name)
        forgotten = checkpoint and not (run_dir / "checkpoints" / checkpoint).exists()
        if published or forgotten or path.name.endswith(".gone"):
            discard(path)


def publish(run_dir: Path, temporary: Path, name: str, tensorboard: bool) -> bool:
    """Put a finished result in place and announce it; False if another worker was faster."""
    if not publish_dir(temporary, evals_dir(run_dir) / name):
        return False
    announce(run_dir, tensorboard)
    return True


def set_damaged_aside(run_dir: Path, name: str) -> tuple[Path, str] | None:
    """Make room where no result is that can be believed: (where it lies now, what is wrong with it)."""
    folder = evals_dir(run_dir) / name
    if not os.path.lexists(folder):
        return None
    try:
        if read_result(folder) is not None:
            return None
        problem = f"it has no {RESULT}"  # published ones have
    except DamagedFileError as error:
        if error.path.parent != folder:
            raise
        problem = f"{error.path.name} is damaged: {error.where}{': ' if error.where else ''}{error.problem}"
    except NotADirectoryError:
        problem = "it is no folder"
    kept = free_name(evals_dir(run_dir) / f"damaged-{name}")
    try:
        os.rename(folder, kept)
    except FileNotFoundError:  # another worker saw it too
        return None
    return kept, problem


def supersede(run_dir: Path, name: str, result: dict[str, Any]) -> None:
    """Set a result aside whose checkpoint was saved again with other weights."""
    kept = evals_dir(run_dir) / f"superseded-{name}-{str(result.get('weights_sha256'))[:8]}"
    discard(kept)
    os.rename(evals_dir(run_dir) / name, free_name(kept))


def announce(
    run_dir: Path, tensorboard: bool, older_than_s: float = 0.0, say: Callable[[str], None] = lambda line: None
) -> None:
    """Add the lines of results that evals.jsonl does not hold yet: also of one whose worker died before its line, or whose
    line is damaged.

    `older_than_s`: leave out younger results, whose own worker is just about to announce them.
    """
    rows, flaws = _announced(run_dir, run_id(run_dir) if is_run(run_dir) else None)
    for flaw in flaws:
        say(f"{flaw}; what is missing in it is written again")
    have = {(row["name"], row.get("weights_sha256")) for row in rows}
    for folder, result in read_results(run_dir):
        settled = time.time() - result.get("time", 0.0) >= older_than_s
        if settled and (folder.name, result["weights_sha256"]) not in have:
            append_record_line(run_dir / EVALS, summary(folder.name, result))
            if tensorboard and result.get("step") is not None:
                _write_tensorboard(run_dir, folder.name, result)


def _announced(root: Path, run: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """(lines of evals.jsonl, what is wrong with others of them). `run`: whose they must be, as far as they say it."""
    path = root / EVALS
    lines = read_lines(path)
    rows = [row for row in lines.rows if isinstance(row.get("name"), str) and row.get("run") in (None, run)]
    flaws = lines.flaws(path)
    if len(rows) < len(lines.rows) and run is not None:
        flaws.append(f"{path} holds lines that are no results of this run: {len(lines.rows) - len(rows)}")
    return rows, flaws


def summary(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """The line of a result in evals.jsonl."""
    line = {"name": name} | {key: result.get(key) for key in SUMMARY} | metrics(result)
    return line | {"weights_sha256": result.get("weights_sha256")}


def metrics(result: dict[str, Any]) -> dict[str, float | None]:
    """The figures of a result by name (see `scores`), bits_per_dim and its standard error, label_agreement."""
    names = [k for k in result if is_distance(k) or is_kernel(k)] + [
        "bits_per_dim",
        "bits_per_dim_stderr",
        "label_agreement",
    ]
    there = [k for k in SCORES if k in result]
    return {name: result.get(name) for name in names + there}


def headline(result: dict[str, Any]) -> str:
    """A result in one line."""
    parts = [f"{key} {value:.2f}" for key, value in metrics(result).items() if is_distance(key) and value is not None]
    if result.get("bits_per_dim") is not None:
        stderr = result.get("bits_per_dim_stderr")
        parts.append(f"{result['bits_per_dim']:.4f}{f' +- {stderr:.4f}' if stderr else ''} bits/dim")
    if result.get("label_agreement") is not None:
        parts.append(f"label agreement {result['label_agreement']:.1%}")
    parts.append(f"{result['num_samples']} samples of {result['weights']}, {result['seconds'].get('total', 0):.0f} s")
    lost = f" | {result['problem']}" if result["problem"] else ""
    what = result["name"]
    if result["step"] is not None:
        what = f"step {result['step']} ({result['images_seen']:,} images)"
    return f"{what}: {' | '.join(parts)}{lost}"


def _write_tensorboard(run_dir: Path, name: str, result: dict[str, Any]) -> None:
    suffix = name.removeprefix(leading_name(name))  # other settings are curves of their own
    figures = {f"eval{suffix}/{key}": value for key, value in metrics(result).items() if value is not None}
    grid = {f"eval{suffix}/grid": evals_dir(run_dir) / name / "grid.png"}
    append_events(run_dir, result["images_seen"], figures, grid, float(result.get("time") or time.time()))
