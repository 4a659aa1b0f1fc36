"""No changed byte of any small file of a run begins it afresh or loses a checkpoint."""

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tarflow.cli
from tarflow.data_pipeline.loading.survey import survey
from tarflow.errors import UserError
from tarflow.records import DamagedFileError
from tarflow.trainer.checkpoint.find import find, newest_intact
from tarflow.trainer.checkpoint.pins import pinned, pinned_names
from tarflow.trainer.checkpoint.retention import apply_retention
from tarflow.trainer.config.files import config_text, load_config, parse_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.resilience.alive import KILLED, last_words, living_writer, read_heartbeats
from tarflow.trainer.resilience.exit_codes import FINISHED, USAGE
from tarflow.trainer.resilience.watchdog import Watchdog, straggler
from tarflow.trainer.run_dir import create_run, note, run_id, save_config, write_identity, writer_lock
from tarflow.trainer.saving.async_writer import AsyncWriter
from tarflow.trainer.saving.handle import Position, SaveHandle
from tarflow.trainer.saving.resume import clean_up, count_restart, decide_start
from tarflow.trainer.start.check import check_start
from tarflow.trainer.start.record import write_record

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
MARKED = {"world_size": 1, "config": "ab", "data": "f00", "classes": ["a", "b", "c"], "code": {"version": "1"}}
FACTS: Any = SimpleNamespace(fingerprint="f00", former_fingerprint="")
TENSORS = "__0_0.distcp"
PINNED = "images-000000000016.reader"


@pytest.fixture(scope="module")
def config(tiny_data: Path) -> Config:
    model = {"image_size": 8, "patch_size": 2, "in_channels": 1, "channels": 64, "num_blocks": 2, "layers_per_block": 1}
    return parse_config(
        {
            "data": {"train": str(tiny_data)},
            "model": model | {"num_classes": 3},
            "train": {"global_batch_size": 16, "max_images": 480},
            "checkpoint": {"keep_latest": 4},
            "log": {"tensorboard": False},
        },
        "test",
    )


@pytest.fixture(scope="module")
def made(config: Config) -> Iterator[Path]:
    """A run as training leaves it: five checkpoints, two snapshots of averages, a reader at work, every small file."""
    with tempfile.TemporaryDirectory(prefix="flipped-", dir=MEMORY) as folder, pytest.MonkeyPatch.context() as patch:
        seen = survey(config.data)
        patch.setattr("tarflow.trainer.start.check.survey", lambda *_: seen)  # the data are not what is damaged here
        run = Path(folder) / "run"
        fill(run, config)
        with pinned(find(run, 1), "reader"):
            yield run


@pytest.fixture
def place(made: Path) -> Iterator[Path]:
    """Where copies of the run can share its files."""
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        yield Path(folder)


def fill(run: Path, config: Config) -> None:
    create_run(run)
    with writer_lock(run), Watchdog(run, 0, 1, config.parallel):
        writer = AsyncWriter(run, config.checkpoint.model_copy(update={"keep_latest": -1}))
        for number in range(1, 6):
            state = {
                "model/w": torch.full((3,), float(number)),
                "ema-0.050/w": torch.ones(3),
                "buffer/var": torch.ones(1),
            }
            save = SaveHandle(Position(16 * number, number), snapshot=number in (2, 4))
            writer.write(save, state, lambda: (config_text(config), MARKED))
            assert save.error is None
        save_config(run, config)
        write_record(run, check_start(config, run, 1).record())
        assert count_restart(run, 80, 3) is None
        note(run, "a line of the log")
    (run / "metrics.jsonl").write_text('{"step": 1, "images_seen": 16, "train/loss": 1.0}\n')


def small_files(run: Path) -> list[Path]:
    return sorted(p.relative_to(run) for p in run.rglob("*") if p.is_file() and p.name != TENSORS)


def twin(run: Path, to: Path) -> Path:
    """A copy that shares its files: what it removes or replaces, it does for itself."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(run, to, copy_function=os.link))


def weights(run: Path) -> set[int]:
    """Which checkpoints and snapshots there are, whatever their names are now."""
    return {p.stat().st_ino for p in run.rglob(TENSORS)}


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.unlink()  # other copies have it, too
    path.write_bytes(data)


def begin(run: Path, config: Config) -> None:
    """What a start does, and then a save; a start afresh is none."""
    check_start(config, run, 1)
    with writer_lock(run):
        start = decide_start(run, config, FACTS, False)
        assert start.checkpoint is not None
        assert start.images_seen >= 64
        clean_up(run, start)
        count_restart(run, start.images_seen, 3)
        apply_retention(run, 2, 0)


def prune(run: Path, config: Config) -> None:
    if tarflow.cli.main(["checkpoint", "prune", str(run)]):
        raise UserError("refused")


def rewind(run: Path, config: Config) -> None:
    if tarflow.cli.main(["checkpoint", "rewind", str(run), "--images", "48"]):
        raise UserError("refused")
    prune(run, config)


@pytest.mark.parametrize(("verb", "most"), [(begin, 8), (prune, 3), (rewind, 1)])
@pytest.mark.case("H02")
def test_no_changed_byte_begins_a_run_afresh_or_loses_a_checkpoint(
    made: Path, config: Config, place: Path, capsys, verb: Callable[[Path, Config], None], most: int
) -> None:
    dice, whole = random.Random(14), twin(made, place / "whole")
    verb(whole, config)
    stays = weights(whole)
    assert stays <= weights(made)
    files = small_files(made)
    for name in ("run.json", "restarts.json", ".lock", "data.json", "config.yaml", f"checkpoints/pins/{PINNED}",
                 "checkpoints/latest", "checkpoints/images-000000000080/COMMITTED", "heartbeats/rank-0000.json",
                 "ema/snapshots/run.json", "checkpoints/images-000000000080/.metadata"):  # fmt: skip
        assert Path(name) in files
    refused = 0
    for file in files:
        size = (made / file).stat().st_size
        places = sorted(dice.sample(range(size), min(size, most)))
        for at in places:
            run, bit = twin(made, place / "run"), dice.randrange(8)
            flip(run / file, at, bit)
            try:
                verb(run, config)
            except UserError:
                refused += 1
            assert stays <= weights(run), f"{verb.__name__}: bit {bit} of byte {at} of {file}"
    capsys.readouterr()
    assert refused > 1


def every_byte(path: Path) -> list[tuple[int, int]]:
    return [(at, bit) for at in range(path.stat().st_size) for bit in (0, 3, 6)]


@pytest.mark.case("H02")
def test_every_byte_of_the_identity_is_held_against_the_others(made: Path, place: Path) -> None:
    """Also in the form of the earlier version, which had no checksum inside."""
    mine = run_id(made)
    for text in ((made / "run.json").read_text(), json.dumps({"run_id": mine})):
        run = twin(made, place / "run")
        (run / "run.json").unlink()
        (run / "run.json").write_text(text)
        for at, bit in every_byte(run / "run.json"):
            flip(run / "run.json", at, bit)
            found = None
            with suppress(UserError):
                found = newest_intact(run, pytest.fail)
                assert found is not None
                assert found.images_seen == 80
            assert found is None or run_id(run) == mine
            flip(run / "run.json", at, bit)


@pytest.mark.case("H02")
def test_a_run_that_disowns_its_checkpoints_names_both_and_the_way_out(
    made: Path, config: Config, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mine = twin(made, place / "run"), run_id(made)
    (run / "run.json").unlink()
    write_identity(run, "0" * 32)
    for refuses in (lambda: check_start(config, run, 1), lambda: decide_start(run, config, FACTS, False)):
        with pytest.raises(UserError, match=r"nothing is begun over them") as error:
            refuses()
        assert mine in str(error.value)
        assert "0" * 32 in str(error.value)
    assert tarflow.cli.main(["checkpoint", "verify", str(run)]) == 1
    for images in (None, 48):
        with pytest.raises(UserError, match="nothing is begun over them"):
            find(run, images=images)
    assert tarflow.cli.main(["checkpoint", "prune", str(run)]) == USAGE
    capsys.readouterr()
    assert tarflow.cli.main(["checkpoint", "list", str(run)]) == 0
    out = capsys.readouterr().out
    assert "nothing is begun over them" in out
    assert "newest" in out
    (run / "run.json").unlink()
    for refuses in (lambda: check_start(config, run, 1), lambda: decide_start(run, config, FACTS, False)):
        with pytest.raises(UserError, match=r"there is no run\.json beside them"):
            refuses()
    (run / "run.json").write_text(json.dumps({"run_id": mine}))  # the way out that it names
    assert decide_start(run, config, FACTS, False).images_seen == 80


@pytest.mark.case("H02")
def test_snapshots_of_another_run_are_not_mixed_with_its_own(made: Path, config: Config, place: Path) -> None:
    run = twin(made, place / "run")
    (run / "ema/snapshots/run.json").unlink()
    write_identity(run / "ema/snapshots", "0" * 32)
    with pytest.raises(UserError, match=r"snapshots are of run 0{32}, but .* says " + run_id(made)):
        decide_start(run, config, FACTS, False)
    (run / "ema/snapshots/run.json").unlink()
    clean_up(run, decide_start(run, config, FACTS, False))
    assert run_id(run / "ema/snapshots") == run_id(made)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"images_seen": 80}', '{"images_seen": 80, "restarts": 1e400}', "\x00\xff"]
)
@pytest.mark.case("H06")
def test_a_damaged_count_of_restarts_does_not_count_as_none(made: Path, config: Config, place: Path, text: str) -> None:
    run = twin(made, place / "run")
    (run / "restarts.json").unlink()
    assert count_restart(run, 80, 3) is None  # not there: the first
    (run / "restarts.json").write_text(text)
    for asks in (lambda: decide_start(run, config, FACTS, False), lambda: count_restart(run, 80, 3)):
        with pytest.raises(DamagedFileError, match=r"restarts\.json .*remove it: restarts are then counted from none"):
            asks()
    (run / "restarts.json").write_text('{"images_seen": 80, "restarts": 3}')  # as the earlier version wrote it
    assert "no progress: 3 restarts" in str(count_restart(run, 80, 3))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"host": "x"}', '{"host": "here", "pid": "../1"}', "host vm, pid 5441", "\xff"]
)
@pytest.mark.case("H06")
def test_a_pin_that_cannot_be_read_holds(made: Path, place: Path, text: str) -> None:
    run = twin(made, place / "run")
    pin = run / "checkpoints/pins" / PINNED
    pin.unlink()
    pin.write_text(text, encoding="latin-1")
    assert pinned_names(run) == {"images-000000000016"}
    os.utime(pin, (0, 0))
    assert pinned_names(run) == set()


@pytest.mark.case("H02")
def test_real_starts_of_a_damaged_run_go_on_or_refuse(tiny_config: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    words = [
        "train",
        str(tiny_config),
        "--run-dir",
        str(run),
        "checkpoint.every_images=16",
        "checkpoint.keep_latest=-1",
    ]
    assert tarflow.cli.main([*words, "train.max_images=48"]) == FINISHED
    there = weights(run)
    for name, way_out in (
        ("run.json", 'write {"run_id": "ID"} into it'),
        ("restarts.json", "remove it"),
        ("data.json", "remove it"),
    ):
        before = (run / name).read_bytes()
        flip(run / name, 20, 0)
        assert tarflow.cli.main([*words, "train.max_images=64"]) == USAGE
        said = capsys.readouterr().err
        assert f"{name} (" in said
        assert way_out in said
        assert "Traceback" not in said
        (run / name).write_bytes(before)
        assert weights(run) == there
    identity = json.loads((run / "run.json").read_text())["run_id"]
    (run / "run.json").write_text(json.dumps({"run_id": ("1" if identity[0] == "0" else "0") + identity[1:]}))
    assert tarflow.cli.main([*words, "train.max_images=64"]) == USAGE
    assert identity in capsys.readouterr().err
    assert weights(run) == there
    (run / "run.json").write_text(json.dumps({"run_id": identity}))
    flip(run / "checkpoints/images-000000000048/COMMITTED", 30, 1)
    assert tarflow.cli.main([*words, "train.max_images=64"]) == FINISHED
    assert "resuming at 32 images" in capsys.readouterr().out
    assert there <= weights(run)
    assert load_config(run / "config.yaml").train.max_images == 64
    flip(run / "config.yaml", 200, 1)
    assert tarflow.cli.main(["checkpoint", "prune", str(run), "--keep-latest", "2"]) == USAGE
    assert "config.yaml is damaged" in capsys.readouterr().err
    assert tarflow.cli.main(["checkpoint", "list", str(run)]) == 0  # what only shows goes on
    out = capsys.readouterr().out
    assert "config.yaml is damaged" in out
    assert "newest" in out


@pytest.mark.parametrize("text", ["", "[]", "{", '{"phase": "gone", "checksum": "00000000"}', '{"pid": -1}', "\xff"])
@pytest.mark.case("H06")
def test_a_damaged_heartbeat_is_a_sign_of_life_for_its_time(made: Path, place: Path, text: str) -> None:
    run = twin(made, place / "run")
    beat = run / "heartbeats/rank-0000.json"
    assert living_writer(run) is None  # it said that it is gone
    beat.unlink()
    beat.write_text(text, encoding="latin-1")
    assert living_writer(run) is not None
    assert living_writer(run, time.time() + 61) is None
    assert last_words(run) == KILLED
    assert straggler(read_heartbeats(run) * 2) is None
