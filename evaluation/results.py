"""Results on disk: one directory per checkpoint and settings, written once (contract 9).

evals/images-000000016000/              the run's own settings, by the checkpoint's name
evals/images-000000016000-0123456789ab/ other settings, by their hash
    result.json  every figure and every setting; the same bytes whoever did the work
    work.json    who did it, when, how long it took
evals/weights-0123456789ab-.../         of a weights file
evals/work/                             chunks of results in the making
evals.jsonl                             one line per result; TensorBoard has the same figures
"""

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tarflow.evaluation.event_file import append_events
from tarflow.evaluation.metrics.names import is_distance, is_kernel
from tarflow.files import append_json_line, discard, free_name, listed, publish_dir, read_json_lines
from tarflow.own_paths import make_folder
from tarflow.trainer.checkpoint.names import leading_name

RESULT = "result.json"
WORK = "work.json"  # who did it and how long it took: apart, so that equal settings give equal result files
SCORES = (
    "distance_stderr", "kernel_stderr", "precision", "recall", "density", "coverage", "inception_score",
)  # fmt: skip
SUMMARY = ("step", "images_seen", "weights", "status", "num_samples", "nonfinite", "settings_hash", "time")


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
        there = read_result(evals_dir(run_dir) / checkpoint)
        if there is None or there.get("settings_hash") == settings_hash:
            return checkpoint
    return f"{checkpoint}-{settings_hash}"


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result in a directory with what is said about the work, or None if there is none."""
    value = _read_object(folder / RESULT)
    return None if value is None else {"seconds": {}, **(_read_object(folder / WORK) or {}), **value}


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_results(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """All results of a run with their directories, by images seen and name."""
    found = []
    for path in listed(evals_dir(run_dir)):
        ours = leading_name(path.name) or path.name.startswith("weights-")
        result = read_result(path) if ours else None
        if result is not None:
            found.append((path, result))
    return sorted(found, key=lambda item: (item[1].get("images_seen") or 0, item[0].name))


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
        result = read_result(evals_dir(run_dir) / name)
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


def set_damaged_aside(run_dir: Path, name: str) -> Path | None:
    """Make room where a result's directory has no readable result, which published ones have; where it lies now."""
    folder = evals_dir(run_dir) / name
    try:
        if not folder.is_dir() or isinstance(json.loads((folder / RESULT).read_text()), dict):
            return None
    except (FileNotFoundError, ValueError):
        pass
    except OSError:  # it may be whole for those who can read it
        return None
    kept = free_name(evals_dir(run_dir) / f"damaged-{name}")
    try:
        os.rename(folder, kept)
    except FileNotFoundError:  # another worker saw it too
        return None
    return kept


def supersede(run_dir: Path, name: str, result: dict[str, Any]) -> None:
    """Set a result aside whose checkpoint was saved again with other weights."""
    kept = evals_dir(run_dir) / f"superseded-{name}-{str(result.get('weights_sha256'))[:8]}"
    discard(kept)
    os.rename(evals_dir(run_dir) / name, free_name(kept))


def announce(run_dir: Path, tensorboard: bool, older_than_s: float = 0.0) -> None:
    """Add the lines of results that evals.jsonl does not hold yet: also of one whose worker died before its line.

    `older_than_s`: leave out younger results, whose own worker is just about to announce them.
    """
    path = run_dir / "evals.jsonl"
    have = {(row.get("name"), row.get("weights_sha256")) for row in read_json_lines(path)}
    for folder, result in read_results(run_dir):
        settled = time.time() - float(result.get("time", 0)) >= older_than_s
        if settled and (folder.name, result.get("weights_sha256")) not in have:
            append_json_line(path, summary(folder.name, result))
            if tensorboard and result.get("step") is not None:
                _write_tensorboard(run_dir, folder.name, result)


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


def _write_tensorboard(run_dir: Path, name: str, result: dict[str, Any]) -> None:
    suffix = name.removeprefix(leading_name(name))  # other settings are curves of their own
    figures = {f"eval{suffix}/{key}": value for key, value in metrics(result).items() if value is not None}
    grid = {f"eval{suffix}/grid": evals_dir(run_dir) / name / "grid.png"}
    append_events(run_dir, result["images_seen"], figures, grid, float(result.get("time") or time.time()))
