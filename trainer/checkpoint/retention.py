"""Which checkpoints are kept, and how the others are removed. Only the run's writer does this.

The rule, by images seen: the newest `keep_latest` are kept; in every range of `keep_every_images` the first checkpoint is
kept for good, which is the one saved when a multiple was crossed, whether or not the batch size divides it; what is being
read is kept. The newest, and the one just committed, are kept whatever the settings say.

Removing may fail (a file held open over NFS, a directory that lost its permissions). What has lost its marker is not a
checkpoint any more, however much of it is still there, and every save and start tries again to remove it.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tarflow.files import discard, free_name
from tarflow.trainer.checkpoint.commit import point_to, remove, stuck
from tarflow.trainer.checkpoint.find import committed, damaged, is_newer, scan, set_aside_dirs
from tarflow.trainer.checkpoint.marker import MARKER, Checkpoint, Damage, Reason, Unusable, damage, inspect
from tarflow.trainer.checkpoint.names import DAMAGED, REPLACED, TEMPORARY, leading_name
from tarflow.trainer.checkpoint.pins import pinned_names
from tarflow.trainer.run_dir import run_id

Warn = Callable[[str], object]


def permanent(checkpoints: Sequence[Checkpoint], every_images: int) -> set[str]:
    """Names of checkpoints that are kept for good: the first at or after each multiple. Given by images seen ascending."""
    first: dict[int, str] = {}
    for checkpoint in checkpoints if every_images else ():
        first.setdefault(checkpoint.images_seen // every_images, checkpoint.name)
    return {name for multiple, name in first.items() if multiple}


def apply_retention(
    run_dir: Path, keep_latest: int, keep_every_images: int, *, fresh: str = "", warn: Warn = lambda _: None
) -> list[str]:
    """Remove checkpoints by the rule above; their names. `fresh`: the one just committed, if there is one.

    `keep_latest` counts as two at least; -1 keeps all. `warn` receives what could not be removed.
    """
    for line in remove_torn(run_dir)[1]:
        warn(line)
    if keep_latest == -1:
        return []
    usable, removed = committed(run_dir), []
    keep = {c.name for c in usable[-max(keep_latest, 2) :]} | {fresh}
    keep |= permanent(usable, keep_every_images) | pinned_names(run_dir)
    for checkpoint in usable:
        if checkpoint.name in keep:
            continue
        assert checkpoint.name not in (fresh, usable[-1].name), f"retention would remove {checkpoint.name}"
        if problem := remove(checkpoint.path):
            warn(stuck(checkpoint.path, problem))
        # Without its marker it counts as removed, even if some of its files could not be.
        if not (checkpoint.path / MARKER).exists():
            removed.append(checkpoint.name)
    return removed


def remove_torn(run_dir: Path) -> tuple[list[Path], list[str]]:
    """Remove what interrupted saves and removals left; what was removed, and a warning for each that could not be."""
    gone, left = [], []
    for path, why in sorted(scan(run_dir)[1].items()):
        if why.reason is Reason.UNCOMMITTED:
            if problem := discard(path):
                left.append(stuck(path, problem))
            else:
                gone.append(path)
    return gone, left


def sweep(run_dir: Path) -> list[str]:
    """Clean up, at a start, what killed processes left; lines for the log, also about what else cannot be used."""
    lines = restore_replaced(run_dir)
    refused = scan(run_dir)[1]
    gone, left = remove_torn(run_dir)
    for path, why in sorted(refused.items()):
        lines.append(f"checkpoint {path.name} is not used: {why}" + (" (removed)" if path in gone else ""))
    if usable := committed(run_dir):
        try:
            point_to(run_dir, usable[-1])  # a save was killed between its marker and the pointer
        except OSError as error:
            left.append(f"WARNING: `latest` could not be written: {error.strerror or error}")
    return lines + left


def restore_replaced(run_dir: Path, look: Damage = damage) -> list[str]:
    """After a save was killed while it replaced a checkpoint at the same images: keep the new one if whole, else the old."""
    lines, owner = [], run_id(run_dir)
    for path, why in sorted(scan(run_dir)[1].items()):
        final = path.with_name(leading_name(path.name))
        if why.reason is not Reason.REPLACED or not path.name.startswith(final.name + REPLACED):
            continue
        there = inspect(final, owner)
        if isinstance(there, Checkpoint) and look(there) is None:
            problem = remove(path)
            lines += [stuck(path, problem)] if problem else []
            continue
        if final.exists():
            torn = isinstance(there, Unusable) and there.reason is Reason.UNCOMMITTED
            os.rename(final, free_name(final.with_name(final.name + (TEMPORARY if torn else DAMAGED))))
        os.rename(path, final)
        lines.append(f"checkpoint {final.name} is put back: the save that was to replace it was interrupted")
    return lines


def set_aside(run_dir: Path, chosen: Checkpoint, ending: str = DAMAGED) -> list[str]:
    """Rename this run's checkpoints newer than the one to resume from: damaged (DAMAGED) or no longer wanted (ASIDE).

    Under their names retention, readers and `latest` would take them for the newest. Renamed, they are kept for a person
    to look at. Returns lines for the log.
    """
    usable, refused = scan(run_dir)
    newer = [c.path for c in usable if c.images_seen > chosen.images_seen]
    newer += [path for path in damaged(refused) if is_newer(path, chosen)]
    if newer:
        point_to(run_dir, chosen)
    lines = []
    for path in sorted(newer):
        aside = free_name(path.with_name(path.name + ending))
        os.rename(path, aside)
        lines.append(
            f"checkpoint {path.name} is set aside as {aside.name}; `tarflow checkpoint prune --{ending[1:]}` removes it"
        )
    return lines


def remove_set_aside(run_dir: Path, ending: str, warn: Warn = lambda _: None) -> list[str]:
    """Remove what `set_aside` has renamed with an ending; names of the removed."""
    removed = []
    for path in set_aside_dirs(run_dir, ending):
        problem = remove(path)
        if problem:
            warn(stuck(path, problem))
        else:
            removed.append(path.name)
    return removed
