"""Which checkpoints a run has: the usable ones, why others are not, and the one that is asked for. Writes nothing."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tarflow.files import listed
from tarflow.records import DamagedFileError, load_record
from tarflow.trainer.checkpoint.marker import (
    MARKER,
    Checkpoint,
    Damage,
    Marker,
    Reason,
    Unusable,
    damage,
    inspect,
    is_marked,
)
from tarflow.trainer.checkpoint.names import (
    ASIDE,
    DAMAGED,
    REPLACED,
    TEMPORARY,
    checkpoints_dir,
    leading_name,
    parse_name,
)
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import is_run, run_id


def newest_intact(run_dir: Path, warn: Callable[[str], None], look: Damage = damage) -> Checkpoint | None:
    """The checkpoint to resume from: the newest whose bytes are intact; None if none was ever committed.

    `warn` receives a line for each damaged one that is skipped. If all are damaged, or another run's, that is an error:
    silently starting from the beginning would throw the run away. `look` reads a checkpoint's files; several ranks share
    them (`saving/together.py`).
    """
    check_identity(run_dir)
    usable, refused = scan(run_dir)
    for checkpoint in reversed(usable):
        problem = look(checkpoint)
        if problem is None:
            return checkpoint
        warn(f"WARNING: checkpoint {checkpoint.name} is damaged and not used: {problem}")
        refused[checkpoint.path] = Unusable(Reason.DAMAGED, problem)
    ours = {path: why for path, why in refused.items() if why.ours}
    if ours:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in sorted(ours.items()))
        raise TrainerError(
            f"run {run_dir} has checkpoints, but none can be used ({reasons}). "
            f"Restore one, or move {checkpoints_dir(run_dir)} away to start from the beginning."
        )
    return None


def check_identity(run_dir: Path) -> None:
    """Refuse a directory whose committed checkpoints all belong to another run, or to none.

    Starting a run there would overwrite them, and one changed letter in run.json is enough to disown a run's own. Raises
    TrainerError, or DamagedFileError for run.json itself.
    """
    mine = run_id(run_dir) if is_run(run_dir) else None
    usable, refused = scan_as(run_dir, mine)
    marked = {path: why for path, why in refused.items() if why.committed}
    if mine is not None and (usable or not marked or any(why.ours for why in marked.values())):
        return
    theirs = sorted({why.run for why in marked.values() if why.run} | {str(c.info["run"]) for c in usable})
    if not usable and not marked:
        return
    whose = f"run {theirs[0]}" if len(theirs) == 1 else f"runs {', '.join(theirs)}" if theirs else "a run"
    here = f"run.json says that this is run {mine}" if mine else "there is no run.json beside them"
    fix = f'write {{"run_id": "{theirs[0]}"}} into {run_dir / "run.json"}' if theirs else "restore run.json from a copy"
    raise TrainerError(
        f"{checkpoints_dir(run_dir)} holds committed checkpoints of {whose}, but {here}; nothing is begun over them. If they "
        f"are this run's, {fix}; if not, move {checkpoints_dir(run_dir)} away or give another --run-dir"
    )


def scan(run_dir: Path) -> tuple[list[Checkpoint], dict[Path, Unusable]]:
    """Usable checkpoints of a run, by images seen ascending, and the directories that are not, with the reasons.

    Raises DamagedFileError for run.json.
    """
    return scan_as(run_dir, run_id(run_dir))


def scan_as(run_dir: Path, owner: str | None) -> tuple[list[Checkpoint], dict[Path, Unusable]]:
    """Like `scan`, for an owner that the caller knows; None: whatever run they belong to."""
    usable, refused = [], {}
    for path in listed(checkpoints_dir(run_dir)):
        name, ending = leading_name(path.name), path.suffix.partition("-")[0]
        if not path.is_dir():
            continue
        if name == path.name:
            found = inspect(path, owner)
        elif name and ending == TEMPORARY:
            found = Unusable(Reason.UNCOMMITTED, "a save was interrupted")
        elif name and ending == REPLACED:
            reason = Reason.REPLACED if is_marked(path) else Reason.UNCOMMITTED
            found = Unusable(reason, "it made way for a save that was interrupted")
        else:
            continue  # not ours: never touched
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
    warn: Callable[[str], None] | None = None,
) -> Checkpoint:
    """The checkpoint of a step or at a number of images seen; by default the one of most images.

    `warn` (default: to standard error) receives a line for each newer one that is damaged. Without a match, or with more
    than one of a step, the error lists what there is and how to choose.
    """
    run_dir = Path(run_dir)
    usable, refused = scan(run_dir)
    if not usable:
        check_identity(run_dir)  # they may all be another run's, and that error says more
    if step is not None or images is not None:
        aside = [path for ending in (DAMAGED, ASIDE) for path in set_aside_dirs(run_dir, ending)]
        reasons = [f"{path.name}: {why}" for path, why in sorted(refused.items())]
        reasons += [f"{path.name} is set aside" for path in aside]
        return choose(usable, step, images, f"run {run_dir}", "usable checkpoint", ", ".join(reasons[-4:]))
    if not usable:
        whys = "; ".join(f"{path.name}: {why}" for path, why in sorted(refused.items())[-4:] if why.committed)
        raise TrainerError(
            f"run {run_dir} has no {f'usable checkpoint ({whys})' if whys else 'committed checkpoint yet'}"
        )
    # The newest one there is may not be the newest there was, which must not go unnoticed.
    for path, text in why_skipped(refused, "used").items():
        if is_newer(path, usable[-1]):
            (warn or _to_stderr)(f"WARNING: checkpoint {text}")
    return usable[-1]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def choose(
    among: Sequence[Checkpoint], step: int | None, images: int | None, whose: str, what: str, unusable: str = ""
) -> Checkpoint:
    """The checkpoint of a step, at a number of images, or (by default) the last of some by images seen ascending."""
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


def damaged(refused: dict[Path, Unusable]) -> dict[Path, Unusable]:
    """Of the unusable directories, this run's checkpoints that were whole once and still have their names."""
    return {path: why for path, why in sorted(refused.items()) if why.reason is Reason.DAMAGED}


def why_skipped(refused: dict[Path, Unusable], doing: str) -> dict[Path, str]:
    """Warnings about committed checkpoints that are not `doing` (used, evaluated, ...): damaged ones, and another run's."""
    theirs = [path for path, why in refused.items() if why.reason is Reason.OTHER_RUN]
    texts = {path: f"{path.name} belongs to another run and is not {doing}" for path in theirs}
    texts |= {path: f"{path.name} is damaged and not {doing}: {why}" for path, why in damaged(refused).items()}
    return {path: texts[path] for path in sorted(texts)}


def is_newer(path: Path, chosen: Checkpoint) -> bool:
    """Whether a directory's checkpoint is newer than another, by its name, or for version 0.1 by its marker as well."""
    kind, number = parse_name(path.name)
    if kind == "images_seen":
        return number > chosen.images_seen
    try:
        return load_record(path / MARKER, Marker).images_seen > chosen.images_seen
    except (OSError, DamagedFileError):
        return number > chosen.step


def set_aside_dirs(run_dir: Path, ending: str) -> list[Path]:
    """Checkpoints that were set aside: at a start (DAMAGED), or by a person (ASIDE)."""
    return [p for p in listed(checkpoints_dir(run_dir), f"*{ending}*") if leading_name(p.name)]
