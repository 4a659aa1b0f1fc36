"""A save beside the training: what is written is the moment of the copy, what does not fit is not begun. Case T01."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tarflow.trainer.checkpoint.find import committed
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.schema import CheckpointConfig
from tarflow.trainer.run_dir import create_run
from tarflow.trainer.saving.background_writer import Save, Staging, Writer


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    create_run(tmp_path / "run")
    return Writer(tmp_path / "run", CheckpointConfig())


def describe() -> tuple[str, dict[str, object]]:
    return "config", {}


def test_what_is_written_is_the_moment_of_the_copy(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARFLOW_FAULT", "save.begin@1=slow:0.3")  # training goes on meanwhile
    weights, staging, save = torch.ones(4), Staging(), Save(1, 8)
    writer.start(save, staging.copy({"model/w": weights}), describe)
    weights.fill_(2)
    assert writer.collect(wait=False) is None
    assert committed(writer.run_dir) == []
    assert writer.collect(wait=True) is save
    assert save.error is None
    assert torch.equal(load_weights(committed(writer.run_dir)[0], "raw")["w"], torch.ones(4))
    held = staging.copy({"model/w": weights})["model/w"]
    assert torch.equal(held, torch.full((4,), 2.0))
    assert held.data_ptr() == staging.copy({"model/w": weights})["model/w"].data_ptr()  # the buffer is used again


@pytest.mark.case("T01")
def test_save_that_does_not_fit_is_refused_before_a_byte_is_written(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500_000))
    save = Save(1, 8)
    writer.write(save, {"model/w": torch.ones(1000)}, describe)
    assert save.error is not None
    assert "a checkpoint needs 1 MB, but" in save.error
    assert "checkpoint.keep_latest=2" in save.error
    assert list((writer.run_dir / "checkpoints").iterdir()) == []
    monkeypatch.undo()
    again = Save(1, 8)
    writer.write(again, {"model/w": torch.ones(1000)}, describe)
    assert again.error is None
    assert [c.step for c in committed(writer.run_dir)] == [1]


def test_failed_write_leaves_no_space_taken_and_the_one_before_untouched(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.write(Save(1, 8), {"model/w": torch.ones(4)}, describe)
    monkeypatch.setattr(
        "tarflow.trainer.saving.background_writer.fault_point",
        lambda point: full() if point == "save.written" else None,
    )
    save = Save(2, 16, began=time.monotonic())
    writer.start(save, {"model/w": torch.zeros(4)}, describe)
    assert writer.collect(wait=True) is save
    assert save.error == "rank 0: No space left on device: file"
    assert sorted(p.name for p in (writer.run_dir / "checkpoints").iterdir()) == ["images-000000000008", "latest"]
    assert torch.equal(load_weights(committed(writer.run_dir)[0], "raw")["w"], torch.ones(4))


def full() -> None:
    import errno
    import os

    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")
