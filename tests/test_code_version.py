"""Which code made this: a checkout asks git, a copy made for a job goes by its note, an installed package says its version."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tarflow import __version__
from tarflow.cluster.submission import snapshot
from tarflow.code_version import describe_code

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "import json; from tarflow.code_version import code_version; print(json.dumps(code_version()))"


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *who, "-C", str(folder), *arguments], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def ask(folder: Path, **env: str) -> dict[str, object]:
    """What the package in a folder says of itself."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | {"PYTHONPATH": str(folder)} | env, capture_output=True, text=True,
        cwd=folder.parent, check=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that holds a small package `tarflow`, with one room as a link as in a checkout."""
    home = tmp_path / "home"
    (home / "tarflow").mkdir(parents=True)
    (home / "models").mkdir()
    (home / "models" / "flow.py").write_text("x = 1\n")
    (home / "tarflow" / "models").symlink_to("../models")
    for name in ("__init__", "interpreter", "code_version"):
        shutil.copy(ROOT / "tarflow" / f"{name}.py", home / "tarflow")
    return home


@pytest.mark.case("V08")
def test_a_checkout_says_its_commit_and_whether_files_differ(package: Path) -> None:
    git(package, "init")
    (package / ".gitignore").write_text("__pycache__\n")
    git(package, "add", ".")
    git(package, "commit", "-m", "first")
    clean = {"version": __version__, "commit": git(package, "rev-parse", "HEAD"), "dirty": False}
    assert ask(package) == clean
    (package / "notes.txt").write_text("not code")
    (package / "runs").mkdir()
    (package / "runs" / "config.yaml").write_text("")
    assert ask(package) == clean, "what is no part of the package changes nothing"
    assert ask(package, GIT_DIR="/nowhere", GIT_WORK_TREE="/") == clean, (
        "another repository's variables are not followed"
    )
    (package / "models" / "new.py").write_text("")
    assert ask(package) == clean | {"dirty": True}
    (package / "models" / "new.py").unlink()
    (package / "models" / "flow.py").write_text("x = 2\n")
    assert ask(package) == clean | {"dirty": True}


@pytest.mark.case("V08")
def test_an_installed_package_says_its_version_alone(package: Path, tmp_path: Path) -> None:
    git(tmp_path, "init")  # a repository further up is that of whoever installed it
    git(tmp_path, "commit", "--allow-empty", "-m", "theirs")
    assert ask(package) == {"version": __version__}
    (package / ".git").mkdir()  # not a repository
    assert ask(package) == {"version": __version__}
    assert ask(package, PATH="/nowhere") == {"version": __version__}
    (package / "tarflow" / "code.json").write_text("{")
    assert ask(package) == {"version": __version__}


@pytest.mark.case("V08")
def test_a_copy_for_a_job_says_the_commit_of_its_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(commit: str) -> Path:
        here = {"version": __version__, "commit": commit, "dirty": True}
        monkeypatch.setattr(snapshot, "code_version", lambda: here)
        return snapshot.take(tmp_path)

    first = take("ab" * 20)
    assert ask(first) == {"version": __version__, "commit": "ab" * 20, "dirty": True}
    assert take("ab" * 20) == first, "kept once"
    assert ask(take("cd" * 20))["commit"] == "cd" * 20
    monkeypatch.undo()
    monkeypatch.setattr(snapshot, "code_version", lambda: ask(first))
    (tmp_path / "again").mkdir()
    assert snapshot.take(tmp_path / "again", first).name == first.name, "a job's own copy, submitted from there"


@pytest.mark.case("V08")
def test_in_words() -> None:
    assert describe_code({"version": "1.2"}) == "tarflow 1.2"
    assert describe_code({"version": "1.2", "commit": "ab" * 20, "dirty": False}) == "tarflow 1.2, commit abababababab"
    assert "with changes that are not committed" in describe_code(
        {"version": "1.2", "commit": "ab" * 20, "dirty": True}
    )
