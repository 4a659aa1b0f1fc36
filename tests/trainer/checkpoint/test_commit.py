"""The commit protocol: a checkpoint is whole, or it is not a checkpoint."""

import itertools
import json
import os
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tarflow.records import save_record
from tarflow.trainer.checkpoint import commit as ckpt
from tarflow.trainer.checkpoint import retention
from tarflow.trainer.checkpoint.find import committed, find, newest_intact, scan
from tarflow.trainer.checkpoint.marker import Checkpoint
from tarflow.trainer.checkpoint.names import checkpoints_dir
from tarflow.trainer.checkpoint.pins import Pin, pinned, pinned_names
from tarflow.trainer.checkpoint.tensors import load_weights, read_tensors, write_tensors
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import create_run, run_id, writer_lock
from tests.helpers.ranks import launch_ranks


@pytest.fixture
def run(tmp_path: Path) -> Path:
    create_run(tmp_path / "run")
    return tmp_path / "run"


def save(run: Path, step: int, value: float = 0.0) -> Checkpoint:
    temporary = ckpt.temporary_dir(run, step * 8)
    tensors = {"model/w": torch.full((3,), value), "ema-0.050/w": torch.full((3,), -value), "buffer/var": torch.ones(2)}
    write_tensors(temporary, tensors)
    (temporary / "config.yaml").write_text("")
    return ckpt.commit(run, temporary, step, step * 8, {"data": "f00"})


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_committed_checkpoint_reads_back_bit_for_bit(run: Path) -> None:
    save(run, 10, 0.1)
    found = find(run)
    assert (found.step, found.images_seen, found.info["run"]) == (10, 80, run_id(run))
    into = {"model/w": torch.empty(3), "ema-0.050/w": torch.empty(3), "buffer/var": torch.empty(2)}
    read_tensors(found, into)
    assert torch.equal(into["model/w"], torch.full((3,), 0.1))
    assert (run / "checkpoints" / "latest").read_text().strip() == "images-000000000080"
    raw = load_weights(found, "raw")
    assert raw.keys() == {"w", "var"}
    assert torch.equal(raw["w"], -load_weights(found, "ema-0.050")["w"])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / "COMMITTED").unlink(), "never committed"),
        (lambda p: (p / "COMMITTED").write_text(""), "marker is damaged"),
        (lambda p: next(p.glob("*.distcp")).unlink(), "is missing"),
        (lambda p: next(p.glob("*.distcp")).write_bytes(b""), "has 0 bytes instead of"),
        (lambda p: os.rename(p, p.with_name(p.name + ".tmp")), "a save was interrupted"),
    ],
)
@pytest.mark.case("T01")
def test_partial_checkpoint_is_not_the_newest(run: Path, damage, reason: str) -> None:
    save(run, 10)
    damage(save(run, 20).path)
    assert find(run).step == 10
    assert any(reason in str(why) for why in scan(run)[1].values())
    with pytest.raises(TrainerError, match=r"no usable checkpoint of step 20: .*usable steps: 10"):
        find(run, 20)
    lines = retention.sweep(run)
    assert len(lines) == 1
    assert reason in lines[0]
    save(run, 20, 0.5)  # the next save of that step replaces the leftover
    assert find(run).step == 20
    assert load_weights(find(run), "raw")["w"][0] == 0.5


def save_and_be_killed(run: Path, name: str, calls: int) -> None:
    """A process of its own: it is killed at a call of the system's `name`, after as many that were made."""
    temporary = ckpt.temporary_dir(run, 160)
    write_tensors(temporary, {"model/w": torch.ones(3)})
    (temporary / "config.yaml").write_text("")
    real, made = getattr(os, name), itertools.count()

    def die(*args: Any, **kwargs: Any) -> Any:
        if next(made) >= calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os, name, die)
    ckpt.commit(run, temporary, 20, 160, {})
    retention.apply_retention(run, 2, 0)


KILLED_BEFORE = [
    *(("fsync", calls) for calls in (0, 3)),  # of the first file, of the directory
    ("rename", 0), ("fsync", 4),  # to the final name, and its parent
    ("fsync", 5), ("replace", 0),  # of the marker
    ("fsync", 7), ("replace", 1),  # of the pointer
    ("unlink", 2), ("fsync", 9), ("unlink", 3), ("rmdir", 0),  # of what retention removes: marker, files, directory
]  # fmt: skip


@pytest.mark.parametrize(("point", "calls"), KILLED_BEFORE)
@pytest.mark.case("T01")
def test_killed_at_any_point_of_a_save_the_newest_whole_checkpoint_wins(run: Path, point: str, calls: int) -> None:
    for step in (5, 8, 10):
        save(run, step)
    ended = launch_ranks(save_and_be_killed, 1, run, point, calls, may_fail=True)
    assert ended.codes[0] in (0, -signal.SIGKILL), ended.output[-500:]
    steps = [c.step for c in committed(run)]
    assert steps[-1] in (10, 20)
    assert len(steps) >= 2
    for checkpoint in committed(run):
        assert load_weights(checkpoint, "raw")["w"].shape == (3,)
    retention.sweep(run)
    assert not [n for n in names(run) if n.endswith(".tmp")]
    assert (run / "checkpoints" / "latest").read_text().strip() == f"images-{8 * steps[-1]:012d}"
    assert [c.step for c in committed(run)] == steps


@pytest.mark.case("T15")
def test_damaged_bytes_are_found_by_checksum_and_an_older_checkpoint_is_taken_loudly(run: Path) -> None:
    for step in (10, 20):
        save(run, step)
    newest = newest_intact(run, pytest.fail)
    assert newest is not None
    assert newest.step == 20
    file = next((run / "checkpoints" / "images-000000000160").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said: list[str] = []
    older = newest_intact(run, said.append)
    assert older is not None
    assert older.step == 10
    assert said == [
        f"WARNING: checkpoint images-000000000160 is damaged and not used: the checksum of its file {file.name} is wrong"
    ]
    (run / "checkpoints" / "images-000000000080" / ".metadata").write_bytes(b"")
    with pytest.raises(TrainerError, match="has checkpoints, but none can be used"):
        newest_intact(run, said.append)


@pytest.mark.case("T15")
def test_fresh_start_only_if_nothing_was_ever_committed(run: Path) -> None:
    assert newest_intact(run, pytest.fail) is None
    ckpt.temporary_dir(run, 80)
    assert newest_intact(run, pytest.fail) is None


@pytest.mark.case("T04")
def test_retention_is_numeric_and_never_takes_the_last(run: Path) -> None:
    for step in (8000, 9000, 10000):
        save(run, step)
    assert retention.apply_retention(run, -1, 0) == []
    assert retention.apply_retention(run, 2, 0) == ["images-000000064000"]
    assert [c.step for c in committed(run)] == [9000, 10000]


@pytest.mark.case("T04")
def test_foreign_and_other_runs_folders_are_left_alone_and_not_used(run: Path, tmp_path: Path) -> None:
    create_run(tmp_path / "other")
    stale = save(tmp_path / "other", 50000)
    save(run, 1)
    os.rename(stale.path, run / "checkpoints" / stale.name)
    (run / "checkpoints" / "my notes").mkdir()
    assert find(run).step == 1
    assert retention.sweep(run) == ["checkpoint images-000000400000 is not used: it belongs to another run"]
    for step in (2, 3, 4):
        save(run, step)
        retention.apply_retention(run, 2, 0)
    assert names(run) == ["images-000000000024", "images-000000000032", "images-000000400000", "latest", "my notes"]


@pytest.mark.case("T04")
def test_permanent_and_pinned_checkpoints_stay(run: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save(run, step)
    with pinned(find(run, 10), owner="reader"):
        assert retention.apply_retention(run, 2, 160) == ["images-000000000240"]  # 160 and 320 are multiples
    assert retention.apply_retention(run, 2, 160) == ["images-000000000080"]


@pytest.mark.parametrize("target", ["nowhere", "images-000000000016.held"], ids=["to nothing", "to itself"])
@pytest.mark.case("H06")
def test_a_pin_that_is_a_broken_link_holds_as_any_other_that_cannot_be_read(run: Path, target: str) -> None:
    pins = checkpoints_dir(run) / "pins"
    pins.mkdir(parents=True, exist_ok=True)
    (pins / "images-000000000016.held").symlink_to(target)
    assert pinned_names(run) == {"images-000000000016"}
    day = 25 * 3600
    os.utime(pins / "images-000000000016.held", (time.time() - day,) * 2, follow_symlinks=False)
    assert pinned_names(run) == set()


@pytest.mark.case("H06")
def test_a_pin_without_its_checksum_holds_whatever_process_it_names(run: Path) -> None:
    pin = checkpoints_dir(run) / "pins" / "images-000000000016.held"
    dead = Pin(host=os.uname().nodename, pid=2**31)
    save_record(pin, dead)
    assert pinned_names(run) == set()
    pin.write_text(dead.model_dump_json())
    assert pinned_names(run) == {"images-000000000016"}


def pin_and_be_killed(run: Path) -> None:
    with pinned(find(run, 10), owner="reader"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_pin_of_a_dead_process_expires(run: Path) -> None:
    for step in (10, 20, 30):
        save(run, step)
    assert launch_ranks(pin_and_be_killed, 1, run, may_fail=True).codes == [-signal.SIGKILL]
    assert list((run / "checkpoints" / "pins").iterdir())
    assert retention.apply_retention(run, 2, 0) == ["images-000000000080"]


@pytest.mark.case("T15")
def test_missing_and_unexpected_tensors_are_listed(run: Path) -> None:
    save(run, 10)
    with pytest.raises(TrainerError) as caught:
        read_tensors(
            find(run), {"model/w": torch.empty(4), "model/extra": torch.empty(1), "buffer/var": torch.empty(2)}
        )
    text = str(caught.value)
    for part in (
        "missing in the checkpoint: model/extra",
        "not in this model: ema-0.050/w",
        "model/w: [3] in the checkpoint, [4] here",
    ):
        assert part in text


@pytest.mark.case("T06")
def test_missing_average_is_an_error_not_a_fallback(run: Path) -> None:
    save(run, 10)
    with pytest.raises(TrainerError, match=r"holds no weights 'ema-0.100'; it holds: ema-0.050, raw"):
        load_weights(find(run), "ema-0.100")


def lock(run: Path) -> None:
    with writer_lock(run):
        pass


@pytest.mark.case("C10")
def test_two_writers_in_one_run_are_refused(run: Path) -> None:
    with writer_lock(run):
        output = launch_ranks(lock, 1, run, may_fail=True).output
        assert "is in use by another process" in output
        assert f"pid {os.getpid()}" in output
    with writer_lock(run):
        pass


def test_directories_that_are_no_run(tmp_path: Path) -> None:
    from tarflow.trainer.run_dir import load_run_config

    with pytest.raises(TrainerError, match="no run directory at"):
        load_run_config(tmp_path / "nowhere")
    with pytest.raises(TrainerError, match="is not a run directory"):
        load_run_config(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(TrainerError, match=r"is not empty and not a run \(it holds thesis.txt\)"):
        create_run(tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]


def test_marker_records_files_with_sizes(run: Path) -> None:
    path = save(run, 10).path
    files = json.loads((path / "COMMITTED").read_text())["files"]
    assert {n: f["size"] for n, f in files.items()} == {
        p.name: p.stat().st_size for p in path.iterdir() if p.name != "COMMITTED"
    }
    assert files[".metadata"]["crc32"] == zlib.crc32((path / ".metadata").read_bytes())
    assert time.time() - (path / "COMMITTED").stat().st_mtime < 60
