"""Every command and every block of code in the pages runs as it is pasted.

In a folder like a new user's, with pictures at home and the demo's digits; programs are made small by
`helpers/programs/short.py`, which says how. Slurm is a few scripts.
"""

import functools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tarflow.cli import parse
from tarflow.trainer.config.files import load_config
from tests.helpers.pages import PAGES, ROOT, blocks, commands
from tests.helpers.warm import server, warm

SHORT = ROOT / "tests/helpers/programs/short.py"
PROGRAMS = ("tarflow", "torchrun", "make", "pip", "python")


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with what a clone has, a home with pictures in it, and the environment of its shell."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "configs", clone / "configs", symlinks=False)
    home = clone / "home"
    draw = np.random.default_rng(0)
    for colour, name in enumerate(("cats", "dogs", "owls")):
        (home / "pictures" / name).mkdir(parents=True)
        for number in range(24):
            pixels = draw.integers(0, 90, (80, 72, 3), dtype=np.uint8)
            pixels[:, :, colour] += 120
            Image.fromarray(pixels).save(home / f"pictures/{name}/{number}.png")
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/activate").touch()
    programs = clone / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SHORT}" {name} "$@"\n')
        (programs / name).chmod(0o755)
    for name in ("pre-commit",):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    spec = spec_from_file_location("fake_slurm", ROOT / "tests/cluster/fake_slurm.py")
    assert spec is not None
    assert spec.loader is not None
    fake = module_from_spec(spec)
    spec.loader.exec_module(fake)
    slurm = fake.FakeSlurm(clone / "slurm", f"{programs}:{os.environ['PATH']}")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "TARFLOW"))}
    own = {
        "PATH": slurm.path,
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WARM": server(),
    }
    yield clone, kept | own
    slurm.kill()


def paste(text: str, place: tuple[Path, dict[str, str]], program: str = "bash") -> str:
    """Give a block to a shell, or to Python, that stops at the first error; what it prints."""
    clone, env = place
    words = ["bash", "-euo", "pipefail", "-c", text] if program == "bash" else warm("-c", text)
    ran = subprocess.run(words, cwd=clone, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, f"{text}\n--- {ran.stdout[-2000:]}\n--- {ran.stderr[-3000:]}"
    return ran.stdout


def test_the_pages_run_as_they_are_pasted(newcomer: tuple[Path, dict[str, str]]) -> None:
    """In the order of a reader: the README first, then each page on its own, in the same folder.

    The page on Python runs from the wheel, in `test_package`.
    """
    clone, _ = newcomer
    paste("tarflow data fetch mnist5k data/mnist5k && tarflow train configs/demo.yaml --run-dir runs/demo", newcomer)
    paste("tarflow data prepare ~/pictures data/imagenet64 --size 64 --val-fraction 0.1", newcomer)
    ran = 0
    for page in (page for page in PAGES if page.name != "python.md"):
        shutil.rmtree(clone / "data/pictures", ignore_errors=True)  # each page begins from the pictures at home
        (clone / "pictures.yaml").unlink(missing_ok=True)
        for block in blocks(page, "bash"):
            paste(block, newcomer)
            ran += 1
        for block in blocks(page, "python"):
            paste(block, newcomer, "python")
            ran += 1
    assert ran >= 10
    for made in ("runs/mine/report.html", "samples/grid.png", "runs/demo/report.html", "runs/in64/slurm"):
        assert (clone / made).exists(), made


def test_every_block_of_yaml_is_a_file_that_is_taken(tmp_path: Path) -> None:
    from tarflow.cluster.submission.profile import load_profile

    profiles = blocks(ROOT / "docs/slurm.md", "yaml")
    assert profiles
    for text in profiles:
        (tmp_path / "profile.yaml").write_text(text)
        assert load_profile(tmp_path / "profile.yaml")
    assert yaml.safe_load(profiles[0])["gpus"] == 8
    (configuration,) = blocks(ROOT / "docs/configuration.md", "yaml")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs/mine.yaml").write_text(configuration)
    assert load_config(tmp_path / "configs/mine.yaml", []).train.global_batch_size == 512
    assert {page.name for page in PAGES if blocks(page, "yaml")} == {"slurm.md", "configuration.md"}


@functools.cache
def help_of(verb: str) -> str:
    done = subprocess.run([sys.executable, "-m", "tarflow", verb, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, verb
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_a_page_is_one(page: Path) -> None:
    """Verbs and options, also of commands in the middle of a sentence; capitals stand for names, `...` for the rest."""
    for line in commands(page):
        words = [word for word in shlex.split(line) if word not in ("...", "|", "head")]
        if len(words) < 2 or words[1].isupper():
            continue
        try:
            parse(words[1:])
        except SystemExit as ended:
            if ended.code:  # a verb in passing, without what it needs: its options are known at least
                known = help_of(words[1])
                missing = [word for word in words[2:] if word.startswith("--") and word.partition("=")[0] not in known]
                assert not missing, line
