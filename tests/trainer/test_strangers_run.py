"""A run directory from someone else: training writes through no link in it, and no verb runs what its configuration names."""

import os
import shlex
import shutil
import subprocess
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
@pytest.mark.case("H07")
def test_training_refuses_a_link_where_it_adds_something(trained, run, precious, capfd, name: str) -> None:
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


@pytest.mark.case("H07")
def test_temporary_names_that_are_known_before_are_no_way_in(trained, run, precious, capfd) -> None:
    names = [".config.yaml.tmp", ".restarts.json.tmp", ".data.json.tmp", ".run.json.tmp", "heartbeats/rank-0000.tmp",
             "checkpoints/.latest.tmp", "checkpoints/images-000000000032.tmp", "logs"]  # fmt: skip
    for name in names:
        (run / name).symlink_to(precious if not name.startswith("checkpoints/images") else precious.parent)
    assert go_on(trained, run) == 0, capfd.readouterr().err
    assert (run / "checkpoints" / "images-000000000032").is_dir()
    assert not (run / "checkpoints" / "images-000000000032").is_symlink()
    assert not (run / "config.yaml").is_symlink()


@pytest.mark.case("H07")
def test_the_run_directory_itself_may_be_a_link(trained, run, capfd) -> None:
    scratch = run.rename(run.parent / "scratch")
    run.symlink_to(scratch)
    assert go_on(trained, run) == 0, capfd.readouterr().err
    assert run.is_symlink()
    assert (scratch / "checkpoints" / "images-000000000032").is_dir()


@pytest.mark.parametrize("name", ["checkpoints", "ema"])
@pytest.mark.case("H07")
def test_nothing_is_pruned_through_a_link(run, capsys, name: str) -> None:
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


READERS = {
    "sample": "sample RUN --out OUT --num 2",
    "sample (training's labels)": "sample RUN --out OUT --num 2",
    "evaluate": "evaluate RUN",
    "sweep-guidance": "sweep-guidance RUN --start 4 --final 4",
    "export": "checkpoint export RUN --out OUT.safetensors",
    "verify": "checkpoint verify RUN",
    "ema": "ema RUN --relative-std 0.1 --out OUT.safetensors",
    "report": "report RUN",
    "status": "status RUN",
}


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.case("H01")
def test_the_configuration_in_a_run_directory_has_no_command_run(run, tmp_path, capfd, verb: str) -> None:
    """`pipe:` in a configuration that a user gives to `train` is meant; in a run directory it came along."""
    mark = tmp_path / "mark"
    for path in [run / "config.yaml", *run.glob("checkpoints/*/config.yaml"), *run.glob("ema/snapshots/*/config.yaml")]:
        tree = yaml.safe_load(path.read_text())
        tree["data"] |= {"train": f"pipe:touch {mark}", "validation": f"pipe:touch {mark}", "reader": "stream"}
        tree["sampling"]["labels"] = "training" if "labels" in verb else "balanced"
        path.write_text(yaml.safe_dump(tree))
    words = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for word in READERS[verb].split()]
    tarflow.cli.main(words)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert not mark.exists()


PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()


def of_the_page(beginning: str) -> str:
    """A command of docs/security.md, without the remark behind it."""
    (line,) = (line.strip() for line in PAGE.splitlines() if line.startswith(f"    {beginning} "))
    return line.partition(" #")[0].strip()


def test_the_page_on_security_finds_what_does_not_belong_in_a_run_directory(run: Path, precious: Path) -> None:
    command = of_the_page("find").replace("RUN", str(run))

    def found() -> list[str]:
        return subprocess.run(shlex.split(command), capture_output=True, text=True, check=True).stdout.split()

    assert found() == []
    (run / "checkpoints" / "link").symlink_to(precious)
    os.mkfifo(run / "pipe")
    assert set(found()) == {str(run / "checkpoints" / "link"), str(run / "pipe")}


def test_the_page_on_security_looks_at_a_configuration_without_running_its_commands(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load((trained / "tiny.yaml").read_text())
    tree["data"] = {"train": f"pipe:touch {tmp_path / 'mark'}", "cache_dir": str(tmp_path / "cache")}
    tree["optim"] = {"warmup_images": 16}
    config = tmp_path / "stranger.yaml"
    config.write_text(yaml.safe_dump(tree))
    grep = subprocess.run(
        shlex.split(of_the_page("grep").replace("CONFIG.yaml", str(config))), capture_output=True, text=True
    )
    assert "pipe:touch" in grep.stdout
    assert "cache_dir" in grep.stdout
    words = of_the_page("tarflow train").replace("CONFIG.yaml", str(config)).split()[1:]
    assert tarflow.cli.main([*words, "--run-dir", str(tmp_path / "new")]) == 0
    assert "pipe:touch" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stranger.yaml"]
