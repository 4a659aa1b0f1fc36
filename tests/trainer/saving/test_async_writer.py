"""A save beside the training: what is written is the moment of the copy, what does not fit is not begun."""

from pathlib import Path

import pytest
import torch

from tarflow.trainer.checkpoint.find import committed
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.schema import CheckpointConfig
from tarflow.trainer.run_dir import create_run
from tarflow.trainer.saving.async_writer import AsyncWriter
from tarflow.trainer.saving.handle import Position, SaveHandle
from tarflow.trainer.saving.staging import Staging
from tests.helpers.storage import Disk


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def writer(tmp_path: Path, disk: Disk) -> AsyncWriter:
    create_run(tmp_path / "run")
    return AsyncWriter(tmp_path / "run", CheckpointConfig(), disk)


def describe() -> tuple[str, dict[str, object]]:
    return "config", {}


def test_what_is_written_is_the_moment_of_the_copy(writer: AsyncWriter, disk: Disk) -> None:
    disk.ready.clear()  # training goes on meanwhile
    weights, staging, save = torch.ones(4), Staging(), SaveHandle(Position(8, 1))
    writer.start(save, staging.copy({"model/w": weights}), describe)
    weights.fill_(2)
    assert not save.done
    assert committed(writer.run_dir) == []
    disk.ready.set()
    save.wait()
    assert save.done
    assert save.error is None
    assert torch.equal(load_weights(committed(writer.run_dir)[0], "raw")["w"], torch.ones(4))
    held = staging.copy({"model/w": weights})["model/w"]
    assert torch.equal(held, torch.full((4,), 2.0))
    assert held.data_ptr() == staging.copy({"model/w": weights})["model/w"].data_ptr()  # the buffer is used again


@pytest.mark.case("T01")
def test_save_that_does_not_fit_is_refused_before_a_byte_is_written(writer: AsyncWriter, disk: Disk) -> None:
    disk.free = 500_000
    save = SaveHandle(Position(8, 1))
    writer.write(save, {"model/w": torch.ones(1000)}, describe)
    assert save.error is not None
    assert "a checkpoint needs 1 MB, but" in save.error
    assert "checkpoint.keep_latest=2" in save.error
    assert list((writer.run_dir / "checkpoints").iterdir()) == []
    disk.free = None
    again = SaveHandle(Position(8, 1))
    writer.write(again, {"model/w": torch.ones(1000)}, describe)
    assert again.error is None
    assert [c.step for c in committed(writer.run_dir)] == [1]


def test_failed_write_leaves_no_space_taken_and_the_one_before_untouched(writer: AsyncWriter, disk: Disk) -> None:
    writer.write(SaveHandle(Position(8, 1)), {"model/w": torch.ones(4)}, describe)
    disk.breaks = True
    save = SaveHandle(Position(16, 2))
    writer.start(save, {"model/w": torch.zeros(4)}, describe)
    save.wait()
    assert save.done
    assert save.error == "rank 0: No space left on device: file"
    assert sorted(p.name for p in (writer.run_dir / "checkpoints").iterdir()) == ["images-000000000008", "latest"]
    assert torch.equal(load_weights(committed(writer.run_dir)[0], "raw")["w"], torch.ones(4))
