"""Results on disk: one directory per checkpoint and settings, written once.

evals/images-000000016000/              the run's own settings, by the checkpoint's name
evals/images-000000016000-0123456789ab/ other settings, by their hash
    result.json  every metric and every setting; the same bytes whoever computed it
    work.json    who computed it, when, how long it took
evals/weights-0123456789ab-.../         of a weights file
evals/work/                             chunks of results that are not published yet
evals.jsonl                             one line per result; TensorBoard has the same metrics
"""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tarflow.errors import UserError, noted
from tarflow.evaluation.log import Log, no_log
from tarflow.evaluation.metrics.names import is_distance, is_kernel, is_spatial
from tarflow.evaluation.result_file import FORMAT, RESULT, WORK, load_result, load_work
from tarflow.evaluation.tracking.trackers import track
from tarflow.files import discard, free_name, listed, make_folder, publish_dir
from tarflow.records import DamagedFileError, append_record_line, read_lines
from tarflow.trainer.checkpoint.names import leading_name
from tarflow.trainer.config.schema import Config
from tarflow.trainer.run_dir import has_run_file, is_run, run_id
from tarflow.trainer.tracking.tracker import Point

__all__ = [
    "FORMAT", "RESULT", "WORK", "announce", "building", "evals_dir", "headline", "metrics", "publish", "read_result",
    "read_results", "remove_leftovers", "result_name", "scan", "set_damaged_aside", "summary", "supersede", "usable_result",
    "work_dir",
]  # fmt: skip
EVALS = "evals.jsonl"
SCORES = (
    "distance_stderr", "spatial_stderr", "kernel_stderr", "precision", "recall", "density", "coverage", "inception_score",
)  # fmt: skip
SUMMARY = ("run", "step", "images_seen", "weights", "status", "num_samples", "nonfinite", "settings_hash", "time")


def evals_dir(run_dir: Path) -> Path:
    """Where the results of a run are."""
    return run_dir / "evals"


def work_dir(run_dir: Path, key: str) -> Path:
    """Where the chunks of a result are until it is published."""
    return evals_dir(run_dir) / "work" / key


def result_name(run_dir: Path, checkpoint: str, settings_hash: str, own: bool) -> str:
    """Name of the directory of a checkpoint's result: the checkpoint's for the run's own settings, otherwise with their hash.

    If the run's own settings changed after a checkpoint was evaluated, the old result keeps the plain name.
    """
    if own:
        there = usable_result(evals_dir(run_dir) / checkpoint)
        if there is None or there["settings_hash"] == settings_hash:
            return checkpoint
    return f"{checkpoint}-{settings_hash}"


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result in a directory below `evals/`, with the content of `work.json`; None if there is none.

    Raises DamagedFileError for one that is not valid.
    """
    root = folder.parent.parent
    try:
        result = load_result(folder, run_id(root) if is_run(root) else None)
    except FileNotFoundError:
        return None
    work: dict[str, Any] = {}
    with suppress(UserError, OSError):  # no metric depends on it, and without its time more is checked, not less
        work = load_work(folder)
    return {"seconds": {}, **work, **result}


def usable_result(folder: Path) -> dict[str, Any] | None:
    """The same, but None for a damaged one, too: `set_damaged_aside` makes room for a new one."""
    try:
        return read_result(folder)
    except DamagedFileError as error:
        if error.path.parent != folder:
            raise
        return None


def scan(root: Path) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """All results of a run with their directories, by images seen and name; and a message for each damaged one."""
    found: list[tuple[Path, dict[str, Any]]] = []
    flaws: list[str] = []
    run = None
    with noted(flaws):
        run = run_id(root) if has_run_file(root) else None
    for path in listed(evals_dir(root)):
        if not (leading_name(path.name) or path.name.startswith("weights-")):
            continue
        result, work = None, dict[str, Any]()
        with noted(flaws), suppress(FileNotFoundError):  # being removed, or never finished
            result = load_result(path, run)
        with noted(flaws):
            work = load_work(path)
        if result is not None:
            found.append((path, {"seconds": {}, **work, **result}))
    with noted(flaws):
        flaws += _announced(root, run)[1]
    return sorted(found, key=lambda item: (item[1]["images_seen"] or 0, item[0].name)), flaws


def read_results(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The valid results of a run; see `scan`."""
    return scan(root)[0]


@contextmanager
def building(run_dir: Path, name: str) -> Iterator[Path]:
    """A temporary directory to build a result in; however the block ends, nothing incomplete stays under evals/."""
    folder = make_folder(run_dir, evals_dir(run_dir).name)
    temporary = folder / f".{name}.{os.uname().nodename}.{os.getpid()}.{uuid.uuid4().hex[:6]}.tmp"
    temporary.mkdir()
    try:
        yield temporary
    finally:
        discard(temporary)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what killed evaluations of this machine left behind."""
    # Results half-built by a process that no longer lives, which only its own machine can tell.
    for path in listed(evals_dir(run_dir), f".*.{os.uname().nodename}.*.tmp"):
        pid = path.name.split(".")[-3]
        if pid.isdigit() and Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists():
            discard(path)
    # Chunks of results that are published, or whose checkpoint was removed.
    for path in listed(work_dir(run_dir, "")):
        name = path.name.rsplit("-", 2)[0]
        result = usable_result(evals_dir(run_dir) / name)
        published = result and path.name == f"{name}-{result['settings_hash']}-{result['weights_sha256'][:12]}"
        checkpoint = leading_name(name)
        orphaned = checkpoint and not (run_dir / "checkpoints" / checkpoint).exists()
        if published or orphaned or path.name.endswith(".gone"):
            discard(path)


def publish(run_dir: Path, temporary: Path, name: str, config: Config, log: Log = no_log) -> bool:
    """Put a finished result in place and announce it; False if another worker was faster."""
    if not publish_dir(temporary, evals_dir(run_dir) / name):
        return False
    announce(run_dir, config, log=log)
    return True


def set_damaged_aside(run_dir: Path, name: str) -> tuple[Path, str] | None:
    """Make room where the result is not valid: (its new path, what is wrong with it); None if there is nothing to move."""
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
        problem = "it is not a folder"
    kept = free_name(evals_dir(run_dir) / f"damaged-{name}")
    try:
        os.rename(folder, kept)
    except FileNotFoundError:  # another worker moved it first
        return None
    return kept, problem


def supersede(run_dir: Path, name: str, result: dict[str, Any]) -> None:
    """Set a result aside whose checkpoint was saved again with other weights."""
    kept = evals_dir(run_dir) / f"superseded-{name}-{str(result.get('weights_sha256'))[:8]}"
    discard(kept)
    os.rename(evals_dir(run_dir) / name, free_name(kept))


def announce(run_dir: Path, config: Config, older_than_s: float = 0.0, log: Log = no_log) -> None:
    """Add the lines of results that evals.jsonl does not hold yet.

    Also of a result whose worker died before its line, or whose line is damaged. `older_than_s`: skip younger results,
    whose own worker is just about to announce them.
    """
    rows, flaws = _announced(run_dir, run_id(run_dir) if is_run(run_dir) else None)
    for flaw in flaws:
        log(f"{flaw}; missing lines are written again")
    have = {(row["name"], row.get("weights_sha256")) for row in rows}
    points = []
    for folder, result in read_results(run_dir):
        settled = time.time() - result.get("time", 0.0) >= older_than_s
        if settled and (folder.name, result["weights_sha256"]) not in have:
            append_record_line(run_dir / EVALS, summary(folder.name, result))
            if result.get("step") is not None:
                points.append(_point(folder, result))
    track(run_dir, config, points, log)


def _announced(root: Path, run: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """(valid lines of evals.jsonl, messages about the others). `run`: the run that they must belong to, if they name one."""
    path = root / EVALS
    lines = read_lines(path)
    rows = [row for row in lines.rows if isinstance(row.get("name"), str) and row.get("run") in (None, run)]
    flaws = lines.flaws(path)
    if len(rows) < len(lines.rows) and run is not None:
        flaws.append(f"{path} holds lines that are not results of this run: {len(lines.rows) - len(rows)}")
    return rows, flaws


def summary(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """The line of a result in evals.jsonl."""
    line = {"name": name} | {key: result.get(key) for key in SUMMARY} | metrics(result)
    return line | {"weights_sha256": result.get("weights_sha256")}


def metrics(result: dict[str, Any]) -> dict[str, float | None]:
    """The metrics of a result by name."""
    names = [k for k in result if is_distance(k) or is_kernel(k) or is_spatial(k)] + [
        "bits_per_dim",
        "bits_per_dim_stderr",
        "label_agreement",
    ]
    return {name: result.get(name) for name in names + [k for k in SCORES if k in result]}


def headline(result: dict[str, Any]) -> str:
    """A result in one line."""
    found = metrics(result).items()
    parts = [
        f"{key} {value:.2f}" for key, value in found if (is_distance(key) or is_spatial(key)) and value is not None
    ]
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


def _point(folder: Path, result: dict[str, Any]) -> Point:
    """A result as trackers take it."""
    suffix = folder.name.removeprefix(leading_name(folder.name))  # other settings get curves of their own
    values = {f"eval{suffix}/{key}": value for key, value in metrics(result).items()}
    grid = {f"eval{suffix}/grid": folder / "grid.png"}
    return Point(result["step"], result["images_seen"], values, grid, float(result.get("time") or time.time()))
