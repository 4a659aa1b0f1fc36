"""Snapshots of the averages alone, kept forever: `tarflow ema` rebuilds averages of other widths from them.

    ema/snapshots/run.json                          the same run as the directory above
    ema/snapshots/checkpoints/images-000000064000/  the averages and the prior's variance, committed like a checkpoint

The save at each multiple of `ema.snapshot_every_images` writes one, before its checkpoint: a run killed between
the two reaches that step again and writes the same. Retention only touches `checkpoints/`.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

import tarflow.trainer.checkpoint.commit as ckpt
from tarflow.files import make_folder
from tarflow.trainer.checkpoint.find import committed, scan, why_skipped
from tarflow.trainer.checkpoint.marker import Checkpoint
from tarflow.trainer.checkpoint.names import checkpoints_dir
from tarflow.trainer.checkpoint.retention import sweep
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import is_run, run_id, write_identity


def snapshots_dir(run_dir: Path) -> Path:
    """Where snapshots are; laid out like a run directory, so that `tarflow.trainer.checkpoint.commit` works on it."""
    return run_dir / "ema" / "snapshots"


def prepare(run_dir: Path) -> Path:
    """Make the directory, with the identity of the run; returns it."""
    folder = snapshots_dir(run_dir)
    if not is_run(folder):
        make_folder(run_dir, "ema", "snapshots")
        write_identity(folder, run_id(run_dir))
    return check(run_dir)


def check(run_dir: Path) -> Path:
    """The directory; if it exists, it must belong to the run. Raises TrainerError, DamagedFileError."""
    folder = snapshots_dir(run_dir)
    if is_run(folder) and (theirs := run_id(folder)) != (mine := run_id(run_dir)):
        raise TrainerError(
            f"{folder / 'run.json'} says that the snapshots are of run {theirs}, but {run_dir / 'run.json'} says {mine}; if "
            f"they are of this run, remove the former (a start writes it again), if not, move {folder} away"
        )
    return folder


def contents(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a checkpoint's tensors that a snapshot holds."""
    return {name: t for name, t in state.items() if name.startswith("ema-") or name == "buffer/var"}


def forget_after(run_dir: Path, images_seen: int) -> list[str]:
    """Remove snapshots past `images_seen`, where the run resumes; returns lines for the log. Writer only."""
    if not checkpoints_dir(snapshots_dir(run_dir)).is_dir():
        return []
    folder, lines = prepare(run_dir), []
    for snapshot in committed(folder):
        if snapshot.images_seen > images_seen:
            problem = ckpt.remove(snapshot.path)
            lines.append(
                f"snapshot of the averages {snapshot.name} is removed: it is after the checkpoint resumed from"
                + (f" (as far as that goes: {problem})" if problem else "")
            )
    sweep(folder)
    return lines


def sources(run_dir: Path, log: Callable[[str], None] = lambda _: None) -> list[Checkpoint]:
    """Everything that holds averages, by images seen: snapshots, and checkpoints where there is no snapshot.

    Damaged ones are skipped and named to `log`.
    """
    moments: dict[int, Checkpoint] = {}
    for home in (run_dir, check(run_dir)):
        if home == run_dir or is_run(home):
            usable, refused = scan(home)
            moments |= {c.images_seen: c for c in usable}
            for path, text in why_skipped(refused, "used").items():
                log(f"WARNING: {path.parent}/{text}")
    return [moments[images_seen] for images_seen in sorted(moments)]
