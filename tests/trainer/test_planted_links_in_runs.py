"""A run directory from someone else, with links in it: training writes through none of them."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import tarflow.cli


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml and the run that it made."""
    folder = tmp_path_factory.mktemp("planted")
    tree = {
        "data": {"train": str(tiny_data)},
        "model": {"image_size": 8, "patch_size": 4, "in_channels": 1, "channels": 16, "num_blocks": 2,
                  "layers_per_block": 1, "head_channels": 8, "num_classes": 3},
        "train": {"global_batch_size": 16, "max_images": 16, "noise_std": 0.1},
        "checkpoint": {"every_images": 16, "keep_latest": -1},
        "ema": {"relative_stds": [0.1], "snapshot_every_images": 16},
        "log": {"every_steps": 1, "tensorboard": False},
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    assert tarflow.cli.main(["train", str(folder / "tiny.yaml"), "--run-dir", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    """A file that nobody means to write; it is as it was afterwards."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "precious").write_text("what must stay")
    yield folder / "precious"
    assert (folder / "precious").read_text() == "what must stay"
    assert [path.name for path in folder.iterdir()] == ["precious"]


def go_on(trained: Path, run: Path, *settings: str) -> int:
    command = ["train", str(trained / "tiny.yaml"), "--run-dir", str(run), "train.max_images=32", *settings]
    return int(tarflow.cli.main(command))


REFUSED = ["log.txt", "metrics.jsonl", "heartbeats", "checkpoints", "ema", "ema/snapshots", "tensorboard", ".lock"]


@pytest.mark.parametrize("name", REFUSED)
def test_h07_training_refuses_a_link_where_it_adds_something(trained, run, precious, capfd, name: str) -> None:
    planted = run / name
    if name == ".lock":
        from tarflow.trainer.run_dir import LOCK

        planted = run / LOCK
    if os.path.lexists(planted):
        planted.rename(run.parent / "aside")
    planted.symlink_to(precious if planted.suffix else precious.parent)
    assert go_on(trained, run, "log.tensorboard=true") != 0
    shown = capfd.readouterr()
    assert f"{planted}: it is a link" in shown.err + shown.out
    assert "Traceback" not in shown.err + shown.out


def test_h07_temporary_names_that_are_known_before_are_no_way_in(trained, run, precious, capfd) -> None:
    names = [".config.yaml.tmp", ".restarts.json.tmp", ".data.json.tmp", ".run.json.tmp", "heartbeats/rank-0000.tmp",
             "checkpoints/.latest.tmp", "checkpoints/images-000000000032.tmp", "logs"]  # fmt: skip
    for name in names:
        (run / name).symlink_to(precious if not name.startswith("checkpoints/images") else precious.parent)
    assert go_on(trained, run) == 0, capfd.readouterr().err
    assert (run / "checkpoints" / "images-000000000032").is_dir()
    assert not (run / "checkpoints" / "images-000000000032").is_symlink()
    assert not (run / "config.yaml").is_symlink()


def test_h07_the_run_directory_itself_may_be_a_link(trained, run, capfd) -> None:
    scratch = run.rename(run.parent / "scratch")
    run.symlink_to(scratch)
    assert go_on(trained, run) == 0, capfd.readouterr().err
    assert run.is_symlink()
    assert (scratch / "checkpoints" / "images-000000000032").is_dir()


@pytest.mark.parametrize("name", ["checkpoints", "ema"])
def test_h07_nothing_is_pruned_through_a_link(run, capsys, name: str) -> None:
    """Another run's checkpoints, of the same identity: a copy of this one."""
    other = shutil.copytree(run, run.parent / "other")
    shutil.rmtree(run / name)
    (run / name).symlink_to(other / name)
    before = sorted(other.rglob("*"))
    assert tarflow.cli.main(["checkpoint", "prune", str(run), "--keep-latest", "2"]) != 0
    assert f"{run / name}: it is a link" in capsys.readouterr().err
    assert sorted(other.rglob("*")) == before


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "data.json"])
def test_what_is_read_may_be_a_link_and_becomes_a_file_when_it_is_written(trained, run, tmp_path, capfd, name) -> None:
    kept = (run / name).rename(tmp_path / "kept")
    before = kept.read_bytes()
    (run / name).symlink_to(kept)
    assert go_on(trained, run) == 0, capfd.readouterr().err
    assert kept.read_bytes() == before
