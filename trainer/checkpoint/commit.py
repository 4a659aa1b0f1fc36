"""Checkpoints: committed or not there at all (design contract 5).

    checkpoints/step-00001000/   tensors (torch's distributed checkpoint), config.yaml
                   COMMITTED     json, written last: step, images_seen, run, files with sizes and checksums, ...
    checkpoints/latest           name of the newest committed checkpoint
    checkpoints/pins/            who is reading which checkpoint

Writing: `step-N.tmp/` -> fsync -> rename -> `COMMITTED` -> `latest` -> retention. Removing goes the other way: first the
pointer, if it names what goes, then the marker. So whatever moment a process is killed at, a directory with a marker is
whole, and the pointer names one with a marker.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflow.files import crc32, fsync_path, fsync_tree, listed, write_text
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.resilience.fault_injection import fault_point
from tarflow.trainer.run_dir import is_run, run_id

MARKER = "COMMITTED"
_STEP = re.compile(r"step-(\d{8,})")
_TORN = re.compile(r"step-\d{8,}(\.tmp)?")
DAMAGED = ".damaged"  # ending of a checkpoint that was set aside
_PIN_LIFETIME_S = 24 * 3600


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path
    step: int
    images_seen: int
    info: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def num_bytes(self) -> int:
        """Size of all its files together."""
        return sum(int(facts["size"]) for facts in self.info["files"].values())


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def read_marker(path: Path, owner: str | None) -> Checkpoint | str:
    """The checkpoint in a directory, or the reason why it is none."""
    try:
        info = json.loads((path / MARKER).read_text())
        step, images_seen, files = int(info["step"]), int(info["images_seen"]), dict(info["files"])
        sizes = {name: int(facts["size"]) for name, facts in files.items()}
    except FileNotFoundError:
        return "it was never committed"
    except (ValueError, KeyError, TypeError):
        return f"its {MARKER} marker is damaged"
    if owner is not None and info.get("run") != owner:
        return "it belongs to another run"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"its file {name} is missing"
        if file.stat().st_size != size:
            return f"its file {name} has {file.stat().st_size} bytes instead of {size}"
    return Checkpoint(path, step, images_seen, info)


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the bytes of a checkpoint's files, by their checksums; None if all is well. Reads it all."""
    for name, facts in checkpoint.info["files"].items():
        if crc32(checkpoint.path / name) != facts["crc32"]:
            return f"the checksum of its file {name} is wrong"
    return None


def newest_sound(run_dir: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to resume from: the newest whose bytes are whole; None if none was ever committed.

    Passing over a damaged one is said; if every one is damaged, that is an error: never a silent fresh start (T15).
    """
    usable, refused = scan(run_dir)
    for checkpoint in reversed(usable):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        say(f"WARNING: checkpoint {checkpoint.name} is damaged and not used: {problem}")
        refused[checkpoint.path] = problem
    ours = {path: why for path, why in refused.items() if (path / MARKER).exists() and "another run" not in why}
    if ours:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in sorted(ours.items()))
        raise TrainerError(
            f"run {run_dir} has checkpoints, but none can be used ({reasons}). "
            f"Restore one, or move {checkpoints_dir(run_dir)} away to start from the beginning."
        )
    return None


def scan(run_dir: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """Usable checkpoints of a run, by step ascending, and the directories that are none, each with the reason."""
    usable, refused = [], {}
    owner = run_id(run_dir)
    folder = checkpoints_dir(run_dir)
    for path in listed(folder):
        if not _TORN.fullmatch(path.name):
            continue  # not ours: never touched (case T04)
        found = read_marker(path, owner) if _STEP.fullmatch(path.name) else "a save was interrupted"
        if isinstance(found, Checkpoint):
            usable.append(found)
        else:
            refused[path] = found
    return sorted(usable, key=lambda c: c.step), refused


def committed(run_dir: str | Path) -> list[Checkpoint]:
    """Usable checkpoints of a run, by step ascending."""
    return scan(Path(run_dir))[0]


def has_checkpoints(run_dir: Path) -> bool:
    """Whether a run is there to go on with."""
    return is_run(run_dir) and bool(committed(run_dir))


def find(run_dir: str | Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of a step, or the newest; if there is none, an error that says what there is."""
    usable, refused = scan(Path(run_dir))
    if step is None:
        if usable:
            return usable[-1]
        raise TrainerError(f"run {run_dir} has no committed checkpoint yet")
    for checkpoint in usable:
        if checkpoint.step == step:
            return checkpoint
    reasons = [why for path, why in refused.items() if path.name.startswith(f"step-{step:08d}")]
    if (checkpoints_dir(Path(run_dir)) / f"step-{step:08d}{DAMAGED}").exists():
        reasons.append(f"it was damaged and set aside as step-{step:08d}{DAMAGED}")
    why = f": {reasons[0]}" if reasons else ""
    have = ", ".join(str(c.step) for c in usable) or "none"
    raise TrainerError(f"run {run_dir} has no usable checkpoint of step {step}{why}; usable steps: {have}")


def sweep(run_dir: Path) -> list[str]:
    """Remove what interrupted saves and removals left; report that, and what else cannot be used. Writer only."""
    lines = []
    usable, refused = scan(run_dir)
    pointer = checkpoints_dir(run_dir) / "latest"
    if usable and _named(pointer) != usable[-1].name:
        write_text(pointer, usable[-1].name + "\n")  # a save was killed between its marker and the pointer
    for path, reason in sorted(refused.items()):
        torn = not (path / MARKER).exists()
        if torn:
            shutil.rmtree(path)
        lines.append(f"checkpoint {path.name} is not used: {reason}" + (" (removed)" if torn else ""))
    return lines


def set_aside(run_dir: Path, chosen: Checkpoint) -> list[str]:
    """Rename this run's checkpoints that are newer than the one it goes on from, which are all damaged. Writer only.

    Where they are they would count as the newest to retention, to readers and to `latest`, and the run, once it comes by
    their step again, would have to remove them. Renamed, they stay for a person to look at. Returns what is to be said.
    """
    usable, refused = scan(run_dir)
    newer = [c.path for c in usable if c.step > chosen.step]
    newer += [path for path in refused if _is_newer_of_ours(path, chosen)]
    if newer:
        write_text(checkpoints_dir(run_dir) / "latest", chosen.name + "\n")
    for path in newer:
        aside = path.with_name(path.name + DAMAGED)
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(path, aside)
    return [
        f"checkpoint {path.name} is set aside as {path.name}{DAMAGED}; `tarflow checkpoint prune --damaged` removes it"
        for path in sorted(newer)
    ]


def remove_set_aside(run_dir: Path) -> list[str]:
    """Remove what `set_aside` has left; names of the removed."""
    paths = listed(checkpoints_dir(run_dir), f"step-*{DAMAGED}")
    for path in paths:
        _remove(path)
    return [path.name for path in paths]


def _is_newer_of_ours(path: Path, chosen: Checkpoint) -> bool:
    """Whether a directory holds a newer checkpoint of the same run, by what can be read of its marker."""
    name = _STEP.fullmatch(path.name)
    if name is None or int(name[1]) <= chosen.step or not (path / MARKER).exists():
        return False
    try:
        return bool(json.loads((path / MARKER).read_text())["run"] == chosen.info["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _named(pointer: Path) -> str:
    """Name in the pointer; empty without one."""
    return pointer.read_text().strip() if pointer.exists() else ""


def commit(
    run_dir: Path,
    temporary: Path,
    step: int,
    images_seen: int,
    info: dict[str, Any],
    sums: Mapping[str, int] | None = None,
) -> Checkpoint:
    """Turn a fully written `step-N.tmp/` into a committed checkpoint and point `latest` at it.

    `sums`: checksums of files that their writers know already; the others are read for theirs.
    """
    sums = sums or {}
    final = temporary.with_suffix("")
    fsync_tree(temporary)
    if final.exists():  # a leftover of another run, or the same step saved again
        _remove(final)
    os.rename(temporary, final)
    fsync_path(final.parent)
    fault_point("save.renamed")
    files = {
        p.name: {"size": p.stat().st_size, "crc32": sums[p.name] if p.name in sums else crc32(p)}
        for p in sorted(final.iterdir())
        if p.is_file()
    }
    record = {"step": step, "images_seen": images_seen, "run": run_id(run_dir), **info, "files": files}
    write_text(final / MARKER, json.dumps(record, indent=1))
    fault_point("save.marked")
    write_text(final.parent / "latest", final.name + "\n")
    fault_point("save.pointed")
    return Checkpoint(final, step, images_seen, record)


def temporary_dir(run_dir: Path, step: int) -> Path:
    """A fresh, empty `step-N.tmp/`."""
    path = checkpoints_dir(run_dir) / f"step-{step:08d}.tmp"
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def apply_retention(run_dir: Path, keep_latest: int, keep_every_images: int) -> list[str]:
    """Remove checkpoints that nobody needs; names of the removed. The newest `keep_latest` (-1: all) always stay."""
    if keep_latest == -1:
        return []
    removed = []
    pins = pinned_names(run_dir)
    for checkpoint in committed(run_dir)[: -max(keep_latest, 2)]:
        permanent = keep_every_images and checkpoint.images_seen % keep_every_images == 0
        if not permanent and checkpoint.name not in pins:
            _remove(checkpoint.path)
            removed.append(checkpoint.name)
    return removed


def _remove(path: Path) -> None:
    pointer = path.parent / "latest"
    if _named(pointer) == path.name:
        pointer.unlink()  # no pointer is better than one to what is not there; the next start and save make it again
        fsync_path(path.parent)
    (path / MARKER).unlink(missing_ok=True)
    fsync_path(path)
    shutil.rmtree(path)


@contextmanager
def pinned(checkpoint: Checkpoint, owner: str) -> Iterator[None]:
    """Keep retention away from a checkpoint while it is read. A pin of a process that died expires by itself."""
    folder = checkpoint.path.parent / "pins"
    folder.mkdir(exist_ok=True)
    pin = folder / f"{checkpoint.name}.{owner.replace('/', '_')}"
    pin.write_text(json.dumps({"host": os.uname().nodename, "pid": os.getpid()}))
    try:
        if not (checkpoint.path / MARKER).exists():
            raise TrainerError(f"checkpoint {checkpoint.path} was removed by retention before it could be read")
        yield
    finally:
        pin.unlink(missing_ok=True)


def pinned_names(run_dir: Path) -> set[str]:
    """Checkpoints that someone reads now."""
    names = set()
    for pin in listed(checkpoints_dir(run_dir) / "pins", "step-*"):
        if _pin_holds(pin):
            names.add(pin.name.partition(".")[0])
        else:
            pin.unlink(missing_ok=True)
    return names


def _pin_holds(pin: Path) -> bool:
    try:
        holder = json.loads(pin.read_text())
        if holder["host"] == os.uname().nodename:
            return Path(f"/proc/{holder['pid']}").exists() or not Path("/proc").exists()
        return time.time() - pin.stat().st_mtime < _PIN_LIFETIME_S
    except FileNotFoundError:
        return False
    except (ValueError, KeyError):
        return time.time() - pin.stat().st_mtime < _PIN_LIFETIME_S
