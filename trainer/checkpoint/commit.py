"""Checkpoints: committed or not there at all (design contract 5).

    checkpoints/images-000000016000/  tensors (torch's distributed checkpoint), config.yaml
                        COMMITTED     json, written last: step, images_seen, run, files with sizes and checksums, ...
    checkpoints/latest                name of the newest committed checkpoint
    checkpoints/pins/                 who is reading which checkpoint

Their order, their names and the pointer go by `images_seen` alone: a batch size that changes on resume changes what a step
is, never what is newer. Writing: `images-N.tmp/` -> fsync -> rename -> `COMMITTED` -> `latest` -> retention
(`retention.py`). Removing goes the other way: first the pointer, if it names what goes, then the marker. So whatever moment
a process is killed at, a directory with a marker is whole, and the pointer names one with a marker.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tarflow.files import crc32, discard, free_name, fsync_path, fsync_tree, write_text
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

    `sums`: checksums of files that their writers know already; the others are read for theirs. `warn` is told what went
    wrong after the checkpoint was committed, which makes it no less committed.
    """
    sums = sums or {}
    final = checkpoints_dir(run_dir) / checkpoint_name(images_seen)
    fsync_tree(temporary)
    before = _make_way(final, run_id(run_dir))
    os.rename(temporary, final)
    fsync_path(final.parent)
    fault_point("save.renamed")
    files = {
        p.name: FileFacts(size=p.stat().st_size, crc32=sums[p.name] if p.name in sums else crc32(p))
        for p in sorted(final.iterdir())
        if p.is_file()
    }
    known = {"step": step, "images_seen": images_seen, "run": run_id(run_dir), **info, "files": files}
    marker = Marker.model_validate(known)
    save_record(final / MARKER, marker, shared=False)
    fault_point("save.marked")
    checkpoint = Checkpoint.of(final, marker)
    try:
        point_to(run_dir, max([checkpoint, *committed(run_dir)], key=lambda c: c.images_seen))
    except OSError as error:
        warn(f"`latest` could not be written ({error.strerror or error}); the next start does it")
    fault_point("save.pointed")
    if before is not None and (problem := remove(before)):
        warn(stuck(before, problem))
    return checkpoint


def remove(path: Path) -> str | None:
    """Take a checkpoint away: pointer, marker, files. Why some of it stays, or None; without a marker it counts as none."""
    try:
        unpoint(path)
        (path / MARKER).unlink(missing_ok=True)
        fsync_path(path)
    except OSError as error:
        return f"{error.strerror or error}: {error.filename or path}"
    return discard(path)


def stuck(path: Path, problem: str) -> str:
    """What is said of a directory that could not be removed."""
    return f"WARNING: checkpoint {path.name} could not be removed ({problem}); the next save or start tries again"


def _make_way(final: Path, owner: str) -> Path | None:
    """Move what stands where a checkpoint is to be; returns what may be removed once the new one is committed.

    A whole checkpoint at the same images stays whole until then: should this be killed, the next start puts it back.
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
    """A fresh, empty `images-N.tmp/`; under a further name if what a killed save left there cannot be removed."""
    path = checkpoints_dir(run_dir) / f"{checkpoint_name(images_seen)}{TEMPORARY}"
    discard(path)
    path = free_name(path)
    path.mkdir(parents=True)
    return path


def point_to(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Let `latest` name a checkpoint."""
    pointer = checkpoints_dir(run_dir) / "latest"
    if _named(pointer) != checkpoint.name:
        write_text(pointer, checkpoint.name + "\n")


def unpoint(path: Path) -> None:
    """Remove `latest` if it names a checkpoint that goes away: no pointer is better than one to what is not there."""
    pointer = path.parent / "latest"
    if _named(pointer) == path.name:
        pointer.unlink()
        fsync_path(path.parent)


def _named(pointer: Path) -> str:
    """Name in the pointer; empty without one. What is damaged names nothing: it is written anew, and nobody goes by it."""
    if not pointer.is_file():  # a pipe in its place would be waited for
        return ""
    with open(pointer, "rb") as file:
        return file.read(300).decode(errors="replace").strip()
