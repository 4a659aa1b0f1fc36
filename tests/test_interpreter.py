"""Interpreters that run this package's code take none from the folder that they are started in."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tarflow import __version__
from tarflow.interpreter import HOME, child_environment, leave_current_folder, module_command
from tests.test_poor_file_system import CONFIG

MODULES = ("PIL", "queue", "json", "torch", "argparse", "selectors", "tarflow", "sitecustomize")


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files that leave a mark if they are imported instead of the real modules."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in MODULES:
        text = f'open(r"{folder}/imported", "a").write(__name__ + " ")\nraise RuntimeError("the trap was imported")\n'
        (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return folder


@pytest.mark.parametrize("path", [None, "", ":", ":/nowhere", "/nowhere:", "/nowhere::/nowhere"])
@pytest.mark.case("H09")
def test_nothing_in_the_current_folder_stands_in_for_a_module(
    trap: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path)
    command = module_command("tarflow", "--version")
    done = subprocess.run(command, env=child_environment(), cwd=trap, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"tarflow {__version__}\n", done.stderr
    assert not (trap / "imported").exists()


def test_the_trap_catches_what_looks_into_the_current_folder(trap: Path) -> None:
    env = child_environment(PYTHONSAFEPATH="")
    done = subprocess.run([sys.executable, "-m", "tarflow"], env=env, capture_output=True, text=True, timeout=60)
    assert "the trap was imported" in done.stderr


def test_own_code_comes_before_what_the_user_has_on_the_path(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{trap}::lib:")
    first, *rest = child_environment()["PYTHONPATH"].split(":")
    assert Path(first) == HOME
    assert rest == [str(trap), "lib"], "what is named is meant, an empty entry is none"
    assert child_environment(OMP_NUM_THREADS="1")["OMP_NUM_THREADS"] == "1"


@pytest.mark.case("H09")
def test_a_process_and_what_its_libraries_start_leave_the_current_folder(
    trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setattr(sys, "path", [str(trap), "/lib", str(trap)])
    monkeypatch.setenv("PYTHONPATH", ":/lib:")
    leave_current_folder()
    assert sys.path == ["/lib"]
    assert (os.environ["PYTHONPATH"], os.environ["PYTHONSAFEPATH"]) == ("/lib", "1")
    monkeypatch.setattr(sys, "path", [str(trap), "/lib"])
    monkeypatch.setenv("PYTHONPATH", f"{trap}:")
    leave_current_folder()
    assert sys.path == [str(trap), "/lib"], "who names a folder means it"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, a configuration, and a run of it."""
    from tarflow.cli import main
    from tarflow.data_pipeline.prepare.sources import open_source
    from tarflow.data_pipeline.prepare.write import Options, prepare

    folder = tmp_path_factory.mktemp("small")
    images = np.random.default_rng(0).integers(0, 255, (30, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(30) % 3)
    prepare(open_source(folder / "images.npz"), folder / "set", Options(size=8, shard_size=8))
    data = {"train": str(folder / "set"), "num_workers": 0}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG | {"data": data}))
    assert main(["train", str(folder / "tiny.yaml"), "--run-dir", str(folder / "run"), "train.max_images=20"]) == 0
    return folder


SCRIPT = [sys.executable, "-P", "-c", "import sys; from tarflow.cli import main; sys.exit(main())"]  # as `tarflow` is
MODULE = [sys.executable, "-m", "tarflow"]


@pytest.mark.parametrize(
    ("command", "path", "words", "early"),
    [
        (SCRIPT, "{home}", ["sample", "{trained}/run", "--out", "samples", "--num", "2", "--device", "cpu"], []),
        (MODULE, "{home}", ["data", "index", "{trained}/set", "--processes", "2"], ["tarflow"]),
        (
            SCRIPT,
            "{home}:",
            ["train", "{trained}/tiny.yaml", "--run-dir", "run", "train.max_images=20", "data.num_workers=1"],
            ["argparse", "json", "tarflow"],
        ),
    ],
    ids=["sample", "python -m, index", "an empty entry in PYTHONPATH, train"],
)
@pytest.mark.case("H09")
def test_verbs_and_their_workers_import_nothing_from_the_current_folder(
    trap: Path, trained: Path, command: list[str], path: str, words: list[str], early: list[str]
) -> None:
    """But for what python itself loads before anything of ours runs, `early`."""
    for name in ["sitecustomize", *early]:
        (trap / f"{name}.py").unlink()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path.format(home=HOME)}
    line = [*command, *(word.format(trained=trained) for word in words)]
    done = subprocess.run(line, env=env, cwd=trap, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (trap / "imported").exists()
