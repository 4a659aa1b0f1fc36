"""Which checkpoints stay, whatever their names, numbers and file systems are like."""

import os
from pathlib import Path

import pytest

from tarflow.trainer.checkpoint import commit as ckpt
from tarflow.trainer.checkpoint import retention
from tarflow.trainer.checkpoint.find import committed, find, scan
from tarflow.trainer.checkpoint.marker import MARKER, Checkpoint, damage
from tarflow.trainer.checkpoint.names import checkpoint_name, leading_name
from tarflow.trainer.checkpoint.pins import pinned
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import create_run
from tests.helpers.checkpoints import WEIGHTS, by_step, fill
from tests.helpers.killed import Killed, killed_at


@pytest.fixture
def run(tmp_path: Path) -> Path:
    create_run(tmp_path / "run")
    return tmp_path / "run"


def save(run: Path, images: int, step: int = 0, content: str = "w") -> Checkpoint:
    """Commit a checkpoint of one small file."""
    temporary = ckpt.temporary_dir(run, images)
    fill(temporary, content)
    return ckpt.commit(run, temporary, step or images, images, {})


def seen(run: Path) -> list[int]:
    return [c.images_seen for c in committed(run)]


def latest(run: Path) -> str:
    return (run / "checkpoints" / "latest").read_text().strip()


@pytest.mark.case("V01")
def test_names_of_both_kinds_are_ordered_by_images(run: Path) -> None:
    for step, images in ((400, 1600), (500, 2000)):
        by_step(run, step, images)
    save(run, 2400, 525)
    assert [c.name for c in committed(run)] == ["step-00000400", "step-00000500", "images-000000002400"]
    assert latest(run) == "images-000000002400"
    with pinned(find(run, step=400), owner="reader"):
        assert retention.apply_retention(run, 2, 0, fresh="images-000000002400") == []
    assert retention.apply_retention(run, 2, 0) == ["step-00000400"]


@pytest.mark.case("V01")
def test_steps_that_went_back_under_an_earlier_version_do_no_harm(run: Path) -> None:
    for step, images in ((400, 1600), (500, 2000), (150, 2400)):
        by_step(run, step, images)
    assert find(run).images_seen == 2400
    assert retention.sweep(run) == []
    assert latest(run) == "step-00000150"
    assert retention.apply_retention(run, 2, 0) == ["step-00000400"]
    assert seen(run) == [2000, 2400]


@pytest.mark.parametrize("below", [1, 2400])
@pytest.mark.case("V01")
def test_what_was_just_committed_stays_even_if_it_is_not_of_most_images(run: Path, below: int) -> None:
    for images in (2400, 3200, 4000):
        save(run, images)
    fresh = save(run, below)
    retention.apply_retention(run, 2, 0, fresh=fresh.name)
    assert seen(run) == [below, 3200, 4000]
    assert latest(run) == "images-000000004000"


@pytest.mark.parametrize("keep_latest", [-5, 0, 1, 2])
@pytest.mark.case("V01")
def test_the_two_newest_stay_whatever_the_settings_say(run: Path, keep_latest: int) -> None:
    for images in (9, 10, 100, 1000):
        save(run, images)
    retention.apply_retention(run, keep_latest, 0)
    assert seen(run) == [100, 1000]


@pytest.mark.case("V01")
def test_the_first_at_or_after_each_multiple_is_permanent(run: Path) -> None:
    checkpoints = [Checkpoint(run / checkpoint_name(n), n, n, {}) for n in (8, 16, 24, 32, 40, 64, 72, 100)]
    kept = {int(name.removeprefix("images-")) for name in retention.permanent(checkpoints, 20)}
    assert kept == {24, 40, 64, 100}
    assert {int(n.removeprefix("images-")) for n in retention.permanent(checkpoints, 8)} == {
        8,
        16,
        24,
        32,
        40,
        64,
        72,
        100,
    }
    assert retention.permanent(checkpoints, 0) == retention.permanent(checkpoints, 101) == set()


@pytest.mark.parametrize("change", range(32))  # as many as such a save makes
@pytest.mark.case("V01")
def test_a_save_at_the_same_images_again_never_costs_the_good_one(run: Path, change: int) -> None:
    save(run, 8)
    save(run, 16, content="first")
    with pytest.raises(Killed), killed_at(change):
        save(run, 16, content="again")
    new = run / "checkpoints" / "images-000000000016"
    is_committed = (new / MARKER).exists() and (new / WEIGHTS).read_text() == "again"
    retention.sweep(run)
    assert seen(run) == [8, 16]
    assert latest(run) == "images-000000000016"
    content = (find(run).path / WEIGHTS).read_text()
    assert content == ("again" if is_committed else "first")
    assert damage(find(run)) is None
    retention.apply_retention(run, 2, 0)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "images-000000000008",
        "images-000000000016",
        "latest",
    ]


@pytest.mark.case("V01")
def test_another_runs_checkpoint_of_the_same_name_is_moved_not_removed(run: Path, tmp_path: Path) -> None:
    create_run(tmp_path / "other")
    (run / "checkpoints").mkdir()
    os.rename(save(tmp_path / "other", 8, content="theirs").path, run / "checkpoints" / checkpoint_name(8))
    save(run, 8, content="ours")
    assert (find(run).path / WEIGHTS).read_text() == "ours"
    assert (run / "checkpoints" / "images-000000000008.other-run" / WEIGHTS).read_text() == "theirs"


@pytest.mark.case("V01")
def test_a_choice_by_step_that_is_not_unique_names_both(run: Path) -> None:
    for images in (8, 16, 24):
        save(run, images, step=5 if images > 8 else 4)
    assert find(run, step=4).images_seen == 8
    assert find(run, images=16).step == find(run, step=5, images=16).step == 5
    with pytest.raises(TrainerError, match=r"has 2 checkpoints of step 5: at 16, 24 images; choose one with --images"):
        find(run, step=5)
    with pytest.raises(TrainerError, match=r"no usable checkpoint of step 4 and at 16 images; usable steps: 4, 5, 5"):
        find(run, step=4, images=16)


@pytest.mark.case("V01")
def test_a_marker_that_contradicts_its_directory_is_not_used(run: Path) -> None:
    save(run, 8)
    os.rename(save(run, 16).path, run / "checkpoints" / checkpoint_name(999))
    assert seen(run) == [8]
    assert [str(why) for why in scan(run)[1].values()] == ["its COMMITTED marker says images_seen 16"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("images-000000000008", "images-000000000008"),
        ("images-000000000008-0123456789ab", "images-000000000008"),
        ("images-1000000000000.host-12", "images-1000000000000"),
        ("step-00000500-0123456789ab-png", "step-00000500"),
        ("images-00000000008", ""),
        ("images-000000000008x", ""),
        ("weights-000000000008", ""),
        ("latest", ""),
    ],
)
@pytest.mark.case("V01")
def test_names_are_read_from_other_names(text: str, name: str) -> None:
    assert leading_name(text) == name
