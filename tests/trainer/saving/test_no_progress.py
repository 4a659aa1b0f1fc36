"""A run that learns nothing commits nothing over good checkpoints, and says where to go back to."""

from pathlib import Path

import pytest
import torch

from benchmarks.async_save import make_manager
from tarflow.trainer.checkpoint.find import committed, find
from tarflow.trainer.resilience.exit_codes import FINISHED, NO_PROGRESS
from tarflow.trainer.saving.manager import CheckpointManager
from tests.helpers.storage import Disk

SETTINGS = (
    "train.global_batch_size=12",
    "checkpoint.every_images=36",
    "log.every_steps=1",
    "train.max_skipped_in_a_row=4",
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run"


def tree(run: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")}


def last_line(run: Path) -> str:
    return (run / "log.txt").read_text().splitlines()[-1]


@pytest.mark.case("V02")
def test_a_diverged_run_leaves_good_checkpoints_alone_however_often_it_is_started(start, tiny_config, run) -> None:
    good = (*SETTINGS, "train.max_images=144")
    assert start(tiny_config, run, *good, ranks=1)["codes"] == [FINISHED]
    before = tree(run)
    bad = (*SETTINGS, "train.max_images=1440", "optim.lr=1e9", "checkpoint.every_images=60")
    for _ in range(3):
        assert start(tiny_config, run, *bad, ranks=1)["codes"] == [NO_PROGRESS]
        assert tree(run) == before
        assert "4 steps in a row had a gradient that was not finite or far out" in last_line(run)
        assert "nothing was saved over images-000000000144, from which the same command goes on" in last_line(run)
        assert f"back to images-000000000108 with `tarflow checkpoint rewind {run} --images 108`" in last_line(run)
    assert start(tiny_config, run, *good, "train.max_images=180", ranks=1)["codes"] == [FINISHED]
    assert find(run).images_seen == 180


@pytest.mark.case("V02")
def test_a_run_that_diverges_from_the_start_says_so_on_all_ranks(start, tiny_config, run) -> None:
    bad = (*SETTINGS, "train.max_images=1440", "optim.lr=1e9", "checkpoint.every_images=60", "parallel.backend=fsdp2")
    assert start(tiny_config, run, *bad, ranks=2)["codes"] == [NO_PROGRESS] * 2
    assert committed(run) == []
    assert "there is no checkpoint yet" in last_line(run)


@pytest.mark.case("V02")
def test_an_end_that_no_step_was_taken_for_is_not_finished(start, tiny_config, run) -> None:
    settings = (*SETTINGS, "checkpoint.every_images=108", "train.skip_spikes=true", "train.max_skipped_in_a_row=1000")
    # As many steps as the guard against spikes needs to know what is ordinary.
    assert start(tiny_config, run, *settings, "train.max_images=432", ranks=1)["codes"] == [FINISHED]
    newest, before = find(run).name, tree(run)
    bad = (*settings, "train.max_images=468", "train.noise_std=100")  # gradients far out from the first step on
    assert start(tiny_config, run, *bad, ranks=1)["codes"] == [NO_PROGRESS]
    assert tree(run) == before
    assert f"nothing was saved over {newest}" in last_line(run)
    assert "every step of this start, until the end at 468 images" in last_line(run)
    assert "Not one step could be taken from there: better go back to images-000000000324" in last_line(run)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def manager(tmp_path: Path, disk: Disk) -> CheckpointManager:
    manager, _ = make_manager(tmp_path, quick=True, storage=disk)
    return manager


def skip(manager: CheckpointManager, in_all: int, in_a_row: int) -> None:
    optimizer = manager.backend.optimizer  # type: ignore[attr-defined]
    optimizer.skipped_steps.fill_(in_all)
    optimizer.skipped_in_a_row.fill_(in_a_row)


def saved(manager: CheckpointManager) -> list[tuple[int, int]]:
    manager.collect(wait=True)
    return [(c.images_seen, c.step) for c in committed(manager.run_dir)]


@pytest.mark.case("V02")
def test_a_save_amid_skipped_steps_waits_for_the_next_that_is_taken(manager: CheckpointManager) -> None:
    manager.save(10, 10)
    skip(manager, in_all=2, in_a_row=2)
    manager.save(20, 20)  # eight were taken, then two skipped
    assert saved(manager) == [(10, 10)]
    assert not manager.overdue()  # nothing is known of the steps after it
    manager.observe_skipped(3.0)
    assert not manager.overdue()
    manager.observe_skipped(0.0)
    assert manager.overdue()
    skip(manager, in_all=3, in_a_row=0)
    manager.save(22, 22)
    assert saved(manager) == [(10, 10), (22, 19)]
    assert not manager.overdue()


@pytest.mark.case("V02")
def test_skipped_steps_alone_make_no_checkpoint_not_even_at_the_end(manager: CheckpointManager) -> None:
    manager.save(10, 10)
    skip(manager, in_all=5, in_a_row=5)
    manager.save(15, 15)
    manager.save(15, 15, last=True)
    assert saved(manager) == [(10, 10)]
    assert not manager.learned(15)
    skip(manager, in_all=6, in_a_row=1)
    manager.save(17, 17, last=True)  # one step was taken: a run that is stopped here keeps it
    assert saved(manager) == [(10, 10), (17, 11)]
    assert manager.learned(17)


@pytest.mark.case("V02")
def test_the_last_steps_of_a_run_that_has_learned_may_be_skipped(manager: CheckpointManager) -> None:
    manager.save(10, 10)
    skip(manager, in_all=1, in_a_row=1)
    manager.save(11, 11, last=True, complete=True)
    assert saved(manager) == [(10, 10), (11, 10)]
    assert manager.learned(11)


@pytest.mark.case("V02")
def test_images_that_are_left_out_on_purpose_are_progress(manager: CheckpointManager) -> None:
    manager.save(10, 10)
    manager.save(20, 10, last=True)
    assert saved(manager) == [(10, 10), (20, 10)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.case("V02")
def test_weights_that_are_not_finite_are_not_saved_though_the_gradient_was(
    manager: CheckpointManager, value: float
) -> None:
    manager.save(10, 10)
    with torch.no_grad():
        next(reversed(manager.backend.locals().values())).view(-1)[-1] = value
    manager.save(20, 20)
    assert saved(manager) == [(10, 10)]
    assert manager.diverged


@pytest.mark.case("V02")
def test_a_save_that_failed_is_not_a_checkpoint_to_measure_by(manager: CheckpointManager, disk: Disk) -> None:
    manager.save(10, 10)
    manager.collect(wait=True)
    disk.free = 0
    manager.save(20, 20)
    assert saved(manager) == [(10, 10)]
    assert manager.failures == 1
    disk.free = None
    skip(manager, in_all=5, in_a_row=5)
    manager.save(25, 25, last=True)  # the ten steps before are not in any checkpoint yet
    assert saved(manager) == [(10, 10), (25, 20)]
