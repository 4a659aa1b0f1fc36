"""Random histories of a run lose no committed checkpoint outside the rule of docs/failures.md.

Whatever batch sizes, retention settings, kills, damage and readers it meets, `latest` is the checkpoint of most images, and
the end has all its images. Here the checkpoint layer is driven by hand, with files in the place of tensors, and killed at its every change of the file
system. `saving/test_histories.py` does a few with real ranks.
"""

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflow.trainer.checkpoint import commit as ckpt
from tarflow.trainer.checkpoint import retention
from tarflow.trainer.checkpoint.find import committed, find, newest_intact
from tarflow.trainer.checkpoint.marker import MARKER, damage
from tarflow.trainer.checkpoint.pins import pinned, pinned_names
from tarflow.trainer.run_dir import create_run
from tarflow.trainer.saving.resume import Start, clean_up
from tests.helpers.checkpoints import WEIGHTS, by_step, fill
from tests.helpers.effort import draws
from tests.helpers.killed import Killed, killed_at

MEMORY = next((folder for folder in ("/dev/shm",) if os.access(folder, os.W_OK)), None)  # not the disk


@dataclass(frozen=True)
class Life:
    """One start of a run, its settings, and how it ends."""

    batch: int
    every: int  # images between saves
    more: int  # images beyond those there are, until it ends
    keep_latest: int
    keep_every: int
    kill: tuple[int, int] | None  # (which save, before which of its changes)
    again: bool  # the last save is made twice, as after one whose outcome was not known
    damage: bool  # a bit of the newest flips while nothing runs
    pin: int | None  # which of its checkpoints somebody reads all the while


lives = st.builds(
    Life,
    batch=st.integers(1, 40),
    every=st.integers(5, 120),
    more=st.integers(1, 200),
    keep_latest=st.sampled_from([-1, 2, 2, 3]),
    keep_every=st.sampled_from([0, 0, 30, 64, 100]),
    kill=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 45)),
    again=st.booleans(),
    damage=st.sampled_from([False, False, False, True]),
    pin=st.none() | st.integers(0, 3),
)


def on_disk(run: Path) -> dict[int, str]:
    """Images seen -> name of every usable checkpoint, each of which must hold what was saved under that number."""
    found = {}
    for checkpoint in committed(run):
        assert checkpoint.images_seen not in found
        if damage(checkpoint) is None:
            assert (checkpoint.path / WEIGHTS).read_text() == f"weights at {checkpoint.images_seen}"
        found[checkpoint.images_seen] = checkpoint.name
    return found


def stay(there: set[int], life: Life) -> set[int]:
    """The rule, written down a second time: what may never go."""
    if life.keep_latest == -1:
        return there
    newest = set(sorted(there)[-max(2, life.keep_latest) :])
    multiples = range(life.keep_every, max(there) + 1, life.keep_every) if life.keep_every else ()
    crossing = {min(n for n in there if n >= m) for m in multiples}
    return newest | {n for n in crossing if any(m <= n < m + life.keep_every for m in multiples)}


def latest(run: Path) -> str | None:
    pointer = run / "checkpoints" / "latest"
    return pointer.read_text().strip() if pointer.exists() else None


def save(run: Path, images: int, step: int, life: Life) -> None:
    """As the writer does it."""
    temporary = ckpt.temporary_dir(run, images)
    fill(temporary, f"weights at {images}")
    fresh = ckpt.commit(run, temporary, step, images, {})
    retention.apply_retention(run, life.keep_latest, life.keep_every, fresh=fresh.name)


def start(run: Path, before: dict[int, str], damaged: str | None) -> int:
    """As a start does it; the images to go on from. Nothing is lost by it but what is damaged."""
    with killed_at(None):
        retention.restore_replaced(run)
        newest = newest_intact(run, lambda _: None)
        clean_up(run, Start(newest))
    wanted = {images for images, name in before.items() if name != damaged}
    assert wanted <= on_disk(run).keys()
    assert newest is not None or not before
    assert latest(run) == (newest.name if newest else None)
    return newest.images_seen if newest else 0


def live(run: Path, life: Life, begin: int) -> tuple[dict[int, str], bool]:
    """Steps and saves until the end of a life: what must be there then, and whether it came to its end."""
    images, step, saves, end = begin, 0, 0, begin + life.more
    while images < end:
        images, step = images + life.batch, step + 1
        if images // life.every == (images - life.batch) // life.every and images < end:
            continue
        for _ in range(1 + (life.again and images >= end)):
            there = on_disk(run)
            readers = set(pinned_names(run))
            try:
                with killed_at(life.kill[1] if life.kill and life.kill[0] == saves else None):
                    save(run, images, step, life)
            except Killed:
                pointed = latest(run)
                assert pointed is None or (run / "checkpoints" / pointed / MARKER).exists()
                # What may have gone is what the rule lets go once the new one counts; everything else must be there.
                kept = stay({*there, images}, life) | {n for n, name in there.items() if name in readers}
                return {n: name for n, name in there.items() if n in kept}, False
            kept = stay({*there, images}, life) | {n for n, name in there.items() if name in readers}
            assert set(on_disk(run)) == kept
            assert latest(run) == on_disk(run)[images] == f"images-{images:012d}"
            saves += 1
    return on_disk(run), True


def flip(run: Path) -> str:
    newest = find(run)
    (newest.path / WEIGHTS).write_text("x" * len(f"weights at {newest.images_seen}"))
    return newest.name


@given(history=st.lists(lives, min_size=2, max_size=7), old=st.booleans())
@settings(max_examples=draws(100), deadline=None)
@pytest.mark.case("V01")
def test_no_history_loses_a_checkpoint_outside_the_rule(history: list[Life], old: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="histories-", dir=MEMORY) as folder:
        run = Path(folder) / "run"
        create_run(run)
        if old:
            by_step(run, 25, 100, "weights at 100")
            by_step(run, 50, 200, "weights at 200")
        expected, reached = on_disk(run), 0
        for life in history:
            damaged = flip(run) if life.damage and len(on_disk(run)) > 1 else None
            begin = start(run, expected, damaged)
            assert damaged or begin >= reached
            with ExitStack() as readers:
                if life.pin is not None and (there := committed(run)):
                    readers.enter_context(pinned(there[life.pin % len(there)], "reader"))
                expected, ended = live(run, life, begin)
            reached = max(expected, default=0)
            if ended:
                assert reached >= begin + life.more
