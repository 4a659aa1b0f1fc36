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
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from tarflow.files import crc32, discard, free_name, fsync_path, fsync_tree, listed, make_folder, write_text
from tarflow.records import DamagedFileError, Record, load_record, save_record
from tarflow.trainer.checkpoint.marker import (
    MARKER,
    Checkpoint,
    FileFacts,
    Marker,
    Refused,
    damage,
    is_marked,
    read_marker,
)
from tarflow.trainer.checkpoint.names import checkpoint_name, is_checkpoint_name, leading_name, says
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.resilience.fault_injection import fault_point
from tarflow.trainer.run_dir import Words, is_run, run_id

# Endings of names: being written, making way for the same images again, set aside by a start, set aside by a person.
TEMPORARY, REPLACED, DAMAGED, ASIDE = ".tmp", ".replaced", ".damaged", ".aside"
_PIN_LIFETIME_S = 24 * 3600


class Pin(Record):
    """Who reads a checkpoint."""

    what = "pin of a checkpoint"
    must_be_sealed = True  # whom it names decides whether its checkpoint may be removed; one of before holds for a day
    host: Words
    pid: int = Field(ge=1, lt=1 << 32)


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def newest_sound(run_dir: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to resume from: the newest whose bytes are whole; None if none was ever committed.

    Passing over a damaged one is said; if every one is damaged or another run's, that is an error: never a silent fresh
    start (T15).
    """
    check_identity(run_dir)
    usable, refused = scan(run_dir)
    for checkpoint in reversed(usable):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        say(f"WARNING: checkpoint {checkpoint.name} is damaged and not used: {problem}")
        refused[checkpoint.path] = Refused(problem)
    ours = {path: why for path, why in refused.items() if why.committed and not why.foreign}
    if ours:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in sorted(ours.items()))
        raise TrainerError(
            f"run {run_dir} has checkpoints, but none can be used ({reasons}). "
            f"Restore one, or move {checkpoints_dir(run_dir)} away to start from the beginning."
        )
    return None


def check_identity(run_dir: Path) -> None:
    """Refuse a directory whose committed checkpoints are all another run's, or nobody's. To begin a run there would write
    over them, and one changed letter of an identity is enough to disown a run's own.

    Raises TrainerError, or DamagedFileError for run.json itself.
    """
    mine = run_id(run_dir) if is_run(run_dir) else None
    usable, refused = scan_as(run_dir, mine)
    marked = {path: why for path, why in refused.items() if why.committed}
    if mine is not None and (usable or not marked or not all(why.foreign for why in marked.values())):
        return
    theirs = sorted({why.run for why in marked.values() if why.run} | {str(c.info["run"]) for c in usable})
    if not usable and not marked:
        return
    whose = f"run {theirs[0]}" if len(theirs) == 1 else f"runs {', '.join(theirs)}" if theirs else "a run"
    here = f"run.json says that this is run {mine}" if mine else "there is no run.json beside them"
    mend = (
        f'write {{"run_id": "{theirs[0]}"}} into {run_dir / "run.json"}' if theirs else "restore run.json from a copy"
    )
    raise TrainerError(
        f"{checkpoints_dir(run_dir)} holds committed checkpoints of {whose}, but {here}; nothing is begun over them. If they "
        f"are this run's, {mend}; if not, move {checkpoints_dir(run_dir)} away or give another --run-dir"
    )


def scan(run_dir: Path) -> tuple[list[Checkpoint], dict[Path, Refused]]:
    """Usable checkpoints of a run, by images seen ascending, and the directories that are none, each with the reason.

    Raises DamagedFileError for run.json.
    """
    return scan_as(run_dir, run_id(run_dir))


def scan_as(run_dir: Path, owner: str | None) -> tuple[list[Checkpoint], dict[Path, Refused]]:
    """The same for an owner that is known otherwise; None: whosever they are."""
    usable, refused = [], {}
    for path in listed(checkpoints_dir(run_dir)):
        name, ending = leading_name(path.name), path.suffix.partition("-")[0]
        if not path.is_dir():
            continue
        if name == path.name:
            found = read_marker(path, owner)
        elif name and ending == TEMPORARY:
            found = Refused("a save was interrupted", committed=False)
        elif name and ending == REPLACED:
            found = Refused("it made way for a save that was interrupted", committed=is_marked(path))
        else:
            continue  # not ours: never touched (case T04)
        if isinstance(found, Checkpoint):
            usable.append(found)
        else:
            refused[path] = found
    return sorted(usable, key=lambda c: (c.images_seen, c.step)), refused


def committed(run_dir: str | Path) -> list[Checkpoint]:
    """Usable checkpoints of a run, by images seen ascending."""
    return scan(Path(run_dir))[0]


def find(
    run_dir: str | Path,
    step: int | None = None,
    images: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Checkpoint:
    """The checkpoint of a step or at so many images, or the one of most images; `say` (or the error output) is
    told which newer ones are damaged.

    If there is none, or more than one of that step, the error says what there is and how to choose.
    """
    run_dir = Path(run_dir)
    usable, refused = scan(run_dir)
    for path, text in passed_over(refused, "used").items() if step is None and images is None and usable else ():
        if is_newer(path, usable[-1]):
            (say or _warn)(f"WARNING: checkpoint {text}")
    if not usable:
        check_identity(run_dir)
    if step is None and images is None and not usable:
        whys = "; ".join(f"{path.name}: {why}" for path, why in sorted(refused.items())[-4:] if why.committed)
        raise TrainerError(
            f"run {run_dir} has no {f'usable checkpoint ({whys})' if whys else 'committed checkpoint yet'}"
        )
    reasons = [f"{path.name}: {why}" for path, why in sorted(refused.items())]
    reasons += [f"{path.name} is set aside" for ending in (DAMAGED, ASIDE) for path in set_aside_dirs(run_dir, ending)]
    return choose(usable, step, images, f"run {run_dir}", "usable checkpoint", ", ".join(reasons[-4:]))


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def choose(
    among: Sequence[Checkpoint], step: int | None, images: int | None, whose: str, what: str, unusable: str = ""
) -> Checkpoint:
    """The one of a step or at so many images, or of most images, of checkpoints by images seen ascending."""
    found = [c for c in among if step in (None, c.step) and images in (None, c.images_seen)]
    if len(found) == 1 or (found and step is None and images is None):
        return found[-1]
    asked = ([] if step is None else [f"of step {step}"]) + ([] if images is None else [f"at {images} images"])
    if found:
        raise TrainerError(
            f"{whose} has {len(found)} checkpoints {' and '.join(asked)}: at "
            f"{', '.join(str(c.images_seen) for c in found)} images; choose one with --images"
        )
    raise TrainerError(
        f"{whose} has no {what} {' and '.join(asked)}{f': {unusable}' if unusable else ''}; "
        f"usable steps: {', '.join(str(c.step) for c in among) or 'none'}; "
        f"images: {', '.join(str(c.images_seen) for c in among) or 'none'}"
    )


def damaged(refused: dict[Path, Refused]) -> dict[Path, Refused]:
    """Of the directories that are no checkpoint: this run's that were whole once, under their own names."""
    ours = {path: why for path, why in refused.items() if why.committed and not why.foreign}
    return {path: ours[path] for path in sorted(ours) if is_checkpoint_name(path.name)}


def passed_over(refused: dict[Path, Refused], doing: str) -> dict[Path, str]:
    """What is to be said of committed checkpoints that are not used (evaluated, touched): damaged ones, and another run's."""
    theirs = {path: why for path, why in refused.items() if why.foreign and is_checkpoint_name(path.name)}
    texts = {path: f"{path.name} belongs to another run and is not {doing}" for path in theirs}
    texts |= {path: f"{path.name} is damaged and not {doing}: {why}" for path, why in damaged(refused).items()}
    return {path: texts[path] for path in sorted(texts)}


def is_newer(path: Path, chosen: Checkpoint) -> bool:
    """Whether a directory holds a newer checkpoint than another, by its name, or of version 0.1 by its marker as well."""
    kind, number = says(path.name)
    if kind == "images_seen":
        return number > chosen.images_seen
    try:
        return load_record(path / MARKER, Marker).images_seen > chosen.images_seen
    except (OSError, DamagedFileError):
        return number > chosen.step


def set_aside_dirs(run_dir: Path, ending: str) -> list[Path]:
    """Checkpoints that a start has set aside as DAMAGED, or a person as ASIDE."""
    return [p for p in listed(checkpoints_dir(run_dir), f"*{ending}*") if leading_name(p.name)]


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
    there = read_marker(final, owner)
    if isinstance(there, Refused) and there.foreign:
        os.rename(final, free_name(final.with_name(final.name + ".other-run")))
        return None
    torn = isinstance(there, Refused) and not there.committed
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


@contextmanager
def pinned(checkpoint: Checkpoint, owner: str) -> Iterator[None]:
    """Keep retention away from a checkpoint while it is read. A pin of a process that died expires by itself."""
    pin = checkpoint.path.parent / "pins" / f"{checkpoint.name}.{owner.replace('/', '_')}"
    with suppress(OSError):  # who may not write here reads without a pin
        make_folder(checkpoint.path.parent, "pins")
        save_record(pin, Pin(host=os.uname().nodename, pid=os.getpid()))
    try:
        if not (checkpoint.path / MARKER).exists():
            raise TrainerError(f"checkpoint {checkpoint.path} was removed by retention before it could be read")
        yield
    finally:
        with suppress(OSError):  # the pin of a process that is gone expires
            pin.unlink()


def pinned_names(run_dir: Path) -> set[str]:
    """Checkpoints that someone reads now."""
    names = set()
    for pin in listed(checkpoints_dir(run_dir) / "pins"):
        if not (name := leading_name(pin.name)):
            continue
        if _pin_holds(pin):
            names.add(name)
        else:
            with suppress(OSError):
                pin.unlink()
    return names


def _pin_holds(pin: Path) -> bool:
    """Whether a pin's reader may be there. One that cannot be read holds for its time: somebody may be reading."""
    try:
        reader = load_record(pin, Pin)
        if reader.host == os.uname().nodename:
            return Path(f"/proc/{reader.pid}").exists() or not Path("/proc").exists()
    except (DamagedFileError, OSError):
        pass
    with suppress(OSError):  # it is gone
        return time.time() - pin.lstat().st_mtime < _PIN_LIFETIME_S  # of the name itself: it may be a link to nothing
    return False
