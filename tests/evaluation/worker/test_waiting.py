"""Checkpoints that wait to be evaluated: the run's retention leaves them alone, up to a number, and more is said."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tarflow.evaluation.waiting import WaitingCheckpoints
from tarflow.evaluation.worker.compute_chunk import Hooks
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.trainer.checkpoint.find import committed
from tarflow.trainer.checkpoint.pins import Pins, pinned_names
from tarflow.trainer.checkpoint.retention import apply_retention

pytestmark = pytest.mark.usefixtures("fake_features")
STEPS = (5, 10, 15, 20)


def scored(run_dir: Path, lines: list[str], removed: list[str], **options: Any) -> list[int]:
    """Steps that are evaluated while the run removes what it may; `removed` receives the names."""
    hooks = Hooks(before_chunk=lambda _: removed.extend(apply_retention(run_dir, 2, 0)))
    done = evaluate(run_dir, False, WorkerOptions(hooks=hooks, **options), lines.append).done
    assert not pinned_names(run_dir)
    return [result["step"] for result in done]


def test_no_checkpoint_is_removed_before_its_turn(make_run) -> None:
    run_dir, _ = make_run(steps=STEPS)
    lines, removed = list[str](), list[str]()
    assert scored(run_dir, lines, removed) == [5, 10, 15, 20]
    assert not [line for line in lines if "retention" in line]
    assert apply_retention(run_dir, 2, 0) + removed == ["images-000000000080", "images-000000000160"]


def test_a_checkpoint_saved_while_another_is_evaluated_waits_too(make_run, save_checkpoint) -> None:
    run_dir, config = make_run(steps=STEPS[:1])
    todo, lines = list(STEPS[1:]), list[str]()

    def meanwhile(_: str) -> None:
        """The run saves all its other checkpoints and removes what it may, while the first one is evaluated."""
        while todo:
            saved = save_checkpoint(run_dir, config, todo[0], 16 * todo.pop(0))
            until_pinned(run_dir, saved.name)
            apply_retention(run_dir, 2, 0)

    options = WorkerOptions(hooks=Hooks(before_chunk=meanwhile), poll_s=0.02)
    done = evaluate(run_dir, True, options, lines.append).done
    assert [result["step"] for result in done] == list(STEPS)


def until_pinned(run_dir: Path, name: str) -> None:
    deadline = time.monotonic() + 60
    while name not in pinned_names(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_more_than_the_limit_may_go_and_each_is_named(make_run) -> None:
    run_dir, _ = make_run(steps=(*STEPS[:3], 17, 20), evaluation={"keep_waiting": 2})
    lines, removed = list[str](), list[str]()
    assert scored(run_dir, lines, removed) == [5, 10, 17, 20]
    assert removed[0] == "images-000000000240"
    said = [line for line in lines if "retention" in line]
    assert said == [
        "5 checkpoints wait to be evaluated, and retention leaves the first 2 of them alone (evaluation.keep_waiting=2)",
        "WARNING: images-000000000240 was removed by the run's retention before it was evaluated (evaluation.keep_waiting=2)",
    ]


def test_newest_first_keeps_the_newest_and_newest_alone_keeps_no_other(make_run) -> None:
    run_dir, _ = make_run(steps=STEPS, evaluation={"order": "newest_first", "keep_waiting": 3})
    removed: list[str] = []
    assert scored(run_dir, [], removed) == [20, 15, 10]
    assert removed == ["images-000000000080"]
    other, _ = make_run(steps=STEPS, name="other")
    assert scored(other, [], removed, newest_only=True) == [20]
    assert [c.step for c in committed(other)] == [15, 20]


def test_one_that_was_evaluated_and_then_removed_is_no_loss(make_run) -> None:
    run_dir, _ = make_run(steps=STEPS)
    lines, done = list[str](), set[str]()
    kept = WaitingCheckpoints(lambda: committed(run_dir), lambda c: c.name not in done, 9, lines.append)
    kept.look()
    assert pinned_names(run_dir) == {c.name for c in committed(run_dir)}
    pin = next((run_dir / "checkpoints/pins").iterdir())
    assert json.loads(pin.read_text())["pid"]
    done |= {"images-000000000080"}
    kept.look()
    assert apply_retention(run_dir, 2, 0) == ["images-000000000080"]
    kept.look()
    assert lines == []


def test_pins_are_renewed_long_before_they_expire(make_run, monkeypatch) -> None:
    run_dir, _ = make_run(steps=STEPS[:1])
    pins, now = Pins("waiting"), time.monotonic()
    pins.hold(committed(run_dir))
    (pin,) = (run_dir / "checkpoints/pins").iterdir()
    pin.unlink()
    for later, there in ((1800, False), (3700, True)):
        monkeypatch.setattr(time, "monotonic", lambda later=later: now + later)
        pins.hold(committed(run_dir))
        assert pin.exists() is there
    pins.hold([])
    assert not pin.exists()
