"""The copy of the code that a job runs: one that lies in the run directory already is used only if it is this very code."""

import os
from pathlib import Path

import pytest

from tarflow.cluster.submission.snapshot import take


@pytest.fixture
def source(tmp_path: Path) -> Path:
    package = tmp_path / "source" / "tarflow"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("a = 1\n")
    (package / "room" / "part.py").write_text("b = 2\n")
    return package.parent


def change(path: Path) -> None:
    path.write_text("import os\n")


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    elsewhere = path.with_name("elsewhere").rename(path.parents[3] / "elsewhere.py")
    path.symlink_to(elsewhere)


PLANTED = {
    "another content": lambda copy: change(copy / "tarflow/room/part.py"),
    "a module more": lambda copy: change(copy / "torch.py"),
    "a module more in the package": lambda copy: change(copy / "tarflow/room/numpy.py"),
    "a folder that is a link": lambda copy: (copy / "extra").symlink_to("/usr/lib"),
    "a file that is a link": lambda copy: replace_by_link(copy / "tarflow/room/part.py"),
    "a file less": lambda copy: (copy / "tarflow/__init__.py").unlink(),
    "a note of another commit": lambda copy: change(copy / "tarflow/code.json"),
    "a pipe": lambda copy: os.mkfifo(copy / "tarflow" / "pipe"),
}


@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED.keys())
@pytest.mark.case("H01")
def test_a_planted_copy_of_the_code_is_not_run(source: Path, tmp_path: Path, plant) -> None:
    slurm = tmp_path / "run" / "slurm"
    slurm.mkdir(parents=True)
    copy = take(slurm, source)
    assert take(slurm, source) == copy
    plant(copy)
    other = take(slurm, source)
    assert other != copy
    assert (other / "tarflow/room/part.py").read_text() == "b = 2\n"
    assert take(slurm, source) == other, "the second copy is used again"


@pytest.mark.case("H01")
def test_a_link_in_the_place_of_the_copy_is_not_followed(source: Path, tmp_path: Path) -> None:
    copy = take(tmp_path, source)
    real = copy.rename(tmp_path / "real")
    copy.symlink_to(real)
    assert take(tmp_path, source).name == f"{copy.name}-2"


@pytest.mark.case("H01")
def test_what_was_compiled_in_a_copy_is_compiled_again(source: Path, tmp_path: Path) -> None:
    copy = take(tmp_path, source)
    compiled = copy / "tarflow" / "room" / "__pycache__"
    compiled.mkdir()
    (compiled / "part.cpython-311.pyc").write_bytes(b"anything")
    assert take(tmp_path, source) == copy
    assert not compiled.exists()
