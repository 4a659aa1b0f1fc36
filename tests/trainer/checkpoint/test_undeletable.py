"""Files that cannot be removed: a commit that worked is a save that worked, and a start never dies of litter."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tarflow.evaluation import results
from tarflow.evaluation.shared_work import SharedWork
from tarflow.files import discard, publish_dir, replace_dir
from tarflow.trainer.checkpoint import commit as ckpt
from tarflow.trainer.checkpoint import retention
from tarflow.trainer.checkpoint.find import committed, find, set_aside_dirs
from tarflow.trainer.checkpoint.marker import MARKER, damage
from tarflow.trainer.checkpoint.names import DAMAGED
from tarflow.trainer.checkpoint.pins import pinned, pinned_names
from tarflow.trainer.config.schema import CheckpointConfig
from tarflow.trainer.run_dir import create_run
from tarflow.trainer.saving.async_writer import AsyncWriter
from tarflow.trainer.saving.handle import Position, SaveHandle
from tests.helpers.checkpoints import fill

HELD = ".nfs0001"  # what an NFS client makes of a removed file that is still open


@pytest.fixture
def run(tmp_path: Path) -> Path:
    create_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(params=[errno.EBUSY, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Makes directories hold a file that cannot be removed, as over NFS; so they cannot be removed either."""
    unlink, rmdir = os.unlink, os.rmdir

    def refuse(path: object, *args: object, dir_fd: int | None = None) -> None:
        if os.path.basename(os.fspath(path)) == HELD:  # type: ignore[call-overload]
            raise OSError(request.param, os.strerror(request.param), path)
        unlink(path, *args, dir_fd=dir_fd)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "unlink", refuse)
    yield lambda folder: (folder / HELD).write_text("open elsewhere")  # type: ignore[misc]
    monkeypatch.setattr(os, "unlink", unlink)
    assert os.rmdir is rmdir


def save(run: Path, images: int) -> SaveHandle:
    writer, save = AsyncWriter(run, CheckpointConfig(keep_latest=2)), SaveHandle(Position(images, images))
    writer.write(save, {"model/w": torch.ones(3)}, lambda: ("config", {}))
    return save


def seen(run: Path) -> list[int]:
    return [c.images_seen for c in committed(run)]


@pytest.mark.case("F03")
def test_a_commit_whose_clean_up_fails_is_a_save_that_worked(run: Path, held) -> None:
    for images in (8, 16):
        save(run, images)
    held(find(run, images=8).path)
    for images in (24, 32, 40):
        done = save(run, images)
        assert done.error is None
        (warning,) = done.warnings  # tried again at every save
        assert warning.startswith("WARNING: checkpoint images-000000000008 could not be removed (")
        assert HELD in warning
        assert seen(run) == [images - 8, images]
    assert os.listdir(run / "checkpoints" / "images-000000000008") == [HELD]  # the rest of it takes no space


@pytest.mark.case("F03")
def test_a_start_says_what_it_cannot_remove_and_the_next_one_removes_it(run: Path, held, monkeypatch) -> None:
    for images in (8, 16):
        save(run, images)
    for name in ("images-000000000024.tmp", "images-000000000032", "step-00000001.tmp"):
        (run / "checkpoints" / name).mkdir()
        held(run / "checkpoints" / name)
    lines = retention.sweep(run)
    assert len([line for line in lines if line.startswith("WARNING: checkpoint ") and HELD in line]) == 3
    assert seen(run) == [8, 16]
    assert save(run, 24).error is None  # though what a killed save left stands in its way
    assert save(run, 32).error is None
    assert seen(run) == [24, 32]
    monkeypatch.undo()
    retention.sweep(run)
    assert sorted(os.listdir(run / "checkpoints")) == ["images-000000000024", "images-000000000032", "latest"]


@pytest.mark.case("F03")
def test_a_directory_without_a_marker_that_stays_is_not_counted(run: Path, held) -> None:
    for images in (8, 16, 24):
        save(run, images)
    held(find(run, images=16).path)
    held(find(run, images=24).path)
    assert retention.apply_retention(run, 2, 0) == []
    save(run, 32)
    assert seen(run) == [24, 32]
    assert retention.apply_retention(run, 2, 0) == []  # 16 is there in part, and is none of the two
    assert seen(run) == [24, 32]


@pytest.mark.case("F03")
def test_a_marker_that_cannot_be_removed_leaves_a_whole_checkpoint(run: Path, monkeypatch) -> None:
    for images in (8, 16, 24):
        save(run, images)
    save_by_hand = ckpt.temporary_dir(run, 32)
    fill(save_by_hand)
    ckpt.commit(run, save_by_hand, 32, 32, {})
    unlink, warned = Path.unlink, list[str]()

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == MARKER:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert retention.apply_retention(run, 2, 0, warn=warned.append) == []
    assert len(warned) == 1
    assert seen(run) == [16, 24, 32]
    assert damage(find(run, images=16)) is None


@pytest.mark.case("F03")
def test_set_aside_and_prune_and_pins_do_not_die_of_it(run: Path, held) -> None:
    for images in (8, 16):
        save(run, images)
    aside = find(run).path.with_name("images-000000000016.damaged")
    aside.mkdir()
    held(aside)
    retention.set_aside(run, find(run, images=8))  # the name it would take is taken
    assert sorted(p.name for p in set_aside_dirs(run, DAMAGED)) == [aside.name, f"{aside.name}-2"]
    warned: list[str] = []
    assert retention.remove_set_aside(run, DAMAGED, warned.append) == [f"{aside.name}-2"]
    assert len(warned) == 1
    pins = run / "checkpoints" / "pins"
    with pinned(find(run), owner="reader"):
        os.rename(next(pins.iterdir()), pins / "gone")  # as if another had removed it
    assert pinned_names(run) == set()


@pytest.mark.case("F03")
def test_who_may_not_pin_reads_all_the_same(run: Path, monkeypatch) -> None:
    save(run, 8)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pinned(find(run), owner="reader"):
        assert damage(find(run)) is None


@pytest.mark.case("F03")
def test_other_folders_that_are_replaced_or_cleared_away(tmp_path: Path, held) -> None:
    final, published = tmp_path / "final", tmp_path / "published"
    for content in ("one", "two", "three"):
        new = tmp_path / "new"
        new.mkdir()
        (new / "content").write_text(content)
        replace_dir(new, final)
        assert (final / "content").read_text() == content
        held(final)
    loser = tmp_path / "loser"
    for folder in (published, loser):
        folder.mkdir()
    held(loser)
    held(published)
    assert not publish_dir(loser, published)
    assert discard(tmp_path / "nothing") is None
    work = tmp_path / "evals" / "work" / "images-000000000008-hash-weights"
    work.mkdir(parents=True)
    held(work)
    results.sweep(tmp_path)  # the checkpoint is gone
    SharedWork.clear(work)
    result = tmp_path / "evals" / "images-000000000008"
    kept = tmp_path / "evals" / "superseded-images-000000000008-0123456789"[:-2]
    for folder in (result, kept):
        folder.mkdir()
    held(kept)
    results.supersede(tmp_path, result.name, {"weights_sha256": "01234567"})
    assert not result.exists()
    shutil.rmtree(kept, ignore_errors=True)
