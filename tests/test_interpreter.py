"""Child interpreters run this package's code, whatever lies in the folder that they are started in."""

import subprocess
from pathlib import Path

import pytest

from tarflow import __version__
from tarflow.interpreter import HOME, child_environment, module_command


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files that would be imported instead of the real modules."""
    for name in ("argparse.py", "queue.py", "tarflow.py"):
        (tmp_path / name).write_text('raise RuntimeError(f"{__name__} of the current folder was imported")\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_nothing_in_the_current_folder_stands_in_for_a_module(trap: Path) -> None:
    command = module_command("tarflow", "--version")
    done = subprocess.run(command, env=child_environment(), cwd=trap, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"tarflow {__version__}\n", done.stderr
    plain = subprocess.run(command, cwd=trap, capture_output=True, text=True, timeout=60)
    assert "of the current folder was imported" in plain.stderr, "the trap would not catch anything"


def test_own_code_comes_before_what_the_user_has_on_the_path(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(trap))
    first, *rest = child_environment()["PYTHONPATH"].split(":")
    assert Path(first) == HOME
    assert rest == [str(trap)]
    assert child_environment(OMP_NUM_THREADS="1")["OMP_NUM_THREADS"] == "1"
