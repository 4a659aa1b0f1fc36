"""The commit protocol: a checkpoint is committed or it does not exist.

    checkpoints/images-000000016000/  tensors (torch's distributed checkpoint), sums of their pieces, config.yaml
                        COMMITTED     json, written last: step, images_seen, run, files with sizes and checksums, ...
    checkpoints/latest                name of the newest committed checkpoint
    checkpoints/pins/                 who is reading which checkpoint (`pins.py`)

Order, names and the pointer go by `images_seen` alone: a batch size that changes on resume changes what a step is, but not
which checkpoint is newer. Writing: `images-N.tmp/` -> fsync -> rename -> `COMMITTED` -> `latest` -> retention
(`retention.py`). Removing goes the other way: the pointer, if it names this checkpoint, then the marker, then the files. So
at whatever moment a process is killed, a directory with a marker is whole, and the pointer names one with a marker.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tarflow.files import crc32, discard, free_name, fsync_path, fsync_tree, open_to_read, write_text
from tarflow.records import save_record
from tarflow.trainer.checkpoint.find import committed
from tarflow.trainer.checkpoint.marker import MARKER, Checkpoint, FileFacts, Marker, Reason, Unusable, inspect
from tarflow.trainer.checkpoint.names import REPLACED, TEMPORARY, checkpoint_name, checkpoints_dir
from tarflow.trainer.resilience.fault_injection import fault_point
from tarflow.trainer.run_dir import run_id


def commit(
    run_dir: Path,
    temporary: Path,
    step: int,
    images_seen: int,
    info: dict[str, Any],
    sums: Mapping[str, int] | None = None,
    warn: Callable[[str], object] = lambda _: None,
) -> Checkpoint:
    """Turn a fully written `images-N.tmp/` into a committed checkpoint and point `latest` at the newest.

    `sums`: CRC-32 of the files whose writers know it already; the others are read for theirs. `warn` receives what went
    wrong after the marker was written: the checkpoint is committed all the same.
    """
    sums = sums or {}
    # Contents first, name second: on disk, nothing under the final name is ever incomplete.
    final = checkpoints_dir(run_dir) / checkpoint_name(images_seen)
    fsync_tree(temporary)
    before = _make_way(final, run_id(run_dir))
    os.rename(temporary, final)
    fsync_path(final.parent)
    fault_point("save.renamed")

    # The marker makes it a checkpoint. It records size and checksum of every file, so that damage shows later.
    files = {
        p.name: FileFacts(size=p.stat().st_size, crc32=sums[p.name] if p.name in sums else crc32(p))
        for p in sorted(final.iterdir())
        if p.is_file()
    }
    known = {"step": step, "images_seen": images_seen, "run": run_id(run_dir), **info, "files": files}
    marker = Marker.model_validate(known)
    save_record(final / MARKER, marker, shared=False)
    fault_point("save.marked")

    # The pointer is for people and scripts; nothing here goes by it, so a failure is only a warning.
    checkpoint = Checkpoint.of(final, marker)
    try:
        point_to(run_dir, max([checkpoint, *committed(run_dir)], key=lambda c: c.images_seen))
    except OSError as error:
        warn(f"`latest` could not be written ({error.strerror or error}); the next start does it")
    fault_point("save.pointed")

    # Only now may the checkpoint that this one replaced go.
    if before is not None and (problem := remove(before)):
        warn(stuck(before, problem))
    return checkpoint


def remove(path: Path) -> str | None:
    """Remove pointer, marker and files of a checkpoint; why some of it stays, or None. Without its marker it is not one."""
    try:
        unpoint(path)
        (path / MARKER).unlink(missing_ok=True)
        fsync_path(path)
    except OSError as error:
        return f"{error.strerror or error}: {error.filename or path}"
    return discard(path)


def stuck(path: Path, problem: str) -> str:
    """The warning about a directory that could not be removed."""
    return f"WARNING: checkpoint {path.name} could not be removed ({problem}); the next save or start tries again"


def _make_way(final: Path, owner: str) -> Path | None:
    """Rename what is in a new checkpoint's place; returns what may be removed once the new one is committed.

    A whole checkpoint at the same images stays whole until then: if this process is killed, the next start restores it.
    """
    if not final.exists():
        return None
    there = inspect(final, owner)
    if isinstance(there, Unusable) and there.reason is Reason.OTHER_RUN:
        os.rename(final, free_name(final.with_name(final.name + ".other-run")))
        return None
    torn = isinstance(there, Unusable) and there.reason is Reason.UNCOMMITTED
    aside = free_name(final.with_name(final.name + (TEMPORARY if torn else REPLACED)))
    unpoint(final)
    os.rename(final, aside)
    return aside


def temporary_dir(run_dir: Path, images_seen: int) -> Path:
    """A new, empty `images-N.tmp/`, with a number appended if what a killed save left there cannot be removed."""
    path = checkpoints_dir(run_dir) / f"{checkpoint_name(images_seen)}{TEMPORARY}"
    discard(path)
    path = free_name(path)
    path.mkdir(parents=True)
    return path


def point_to(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Point `latest` at a checkpoint."""
    pointer = checkpoints_dir(run_dir) / "latest"
    if _named(pointer) != checkpoint.name:
        write_text(pointer, checkpoint.name + "\n")


def unpoint(path: Path) -> None:
    """Remove `latest` if it names a checkpoint that is about to go: no pointer is better than a dangling one."""
    pointer = path.parent / "latest"
    if _named(pointer) == path.name:
        pointer.unlink()
        fsync_path(path.parent)


def _named(pointer: Path) -> str:
    """The name in the pointer; empty without one. A damaged pointer names no checkpoint and is rewritten."""
    if not pointer.is_file():  # reading a pipe in its place would block
        return ""
    with open_to_read(pointer) as file:
        return file.read(300).decode(errors="replace").strip()
