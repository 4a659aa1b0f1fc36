"""Snapshots of the averages alone, kept for ever: what `tarflow ema` rebuilds an average of another width from.

    ema/snapshots/run.json                          the same run as the directory above
    ema/snapshots/checkpoints/images-000000064000/  the averages and the prior's variance, committed as a checkpoint is

Every `ema.snapshot_every_images` the save that is due writes one, before its checkpoint: a run that is killed between
the two comes by again and writes the same. Retention looks after `checkpoints/` and never comes here.
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
    """A run directory in the small: all that `tarflow.trainer.checkpoint.commit` does works on it."""
    return run_dir / "ema" / "snapshots"


def prepare(run_dir: Path) -> Path:
    """Make the directory, as the same run's; returns it."""
    folder = snapshots_dir(run_dir)
    if not is_run(folder):
        make_folder(run_dir, "ema", "snapshots")
        write_identity(folder, run_id(run_dir))
    return check(run_dir)


def check(run_dir: Path) -> Path:
    """The directory, which must say that it is the same run's if it is there. Raises TrainerError, DamagedFileError."""
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
    """Remove snapshots of a future that a run going on from `images_seen` may not have; lines for the log. Writer only."""
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


def sources(run_dir: Path, say: Callable[[str], None] = lambda _: None) -> list[Checkpoint]:
    """Everything that holds averages, by images seen ascending: snapshots, and checkpoints at other moments. `say` is told
    what is damaged and so left out.
    """
    moments: dict[int, Checkpoint] = {}
    for home in (run_dir, check(run_dir)):
        if home == run_dir or is_run(home):
            usable, refused = scan(home)
            moments |= {c.images_seen: c for c in usable}
            for path, text in why_skipped(refused, "used").items():
                say(f"WARNING: {path.parent}/{text}")
    return [moments[images_seen] for images_seen in sorted(moments)]
