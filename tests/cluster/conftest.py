"""Tiny data, a profile, the verbs as functions, and the live cluster of tests marked `slurm`."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tests.cluster.fake_slurm
from tests.cluster import live
from tests.helpers.data import halves, prepared
from tests.helpers.runs import write_config


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 grey 8 px images in 2 classes, as indexed shards of 32."""
    return prepared(tmp_path_factory.mktemp("tiny"), *halves(), shard_size=32)


@pytest.fixture
def config_file(tiny_data: Path, tmp_path: Path) -> Path:
    """200 steps of 16 images; a checkpoint every 50."""
    return write_config(
        tmp_path / "tiny.yaml", tiny_data, model={"channels": 32, "head_channels": 16, "num_classes": 2},
        train={"global_batch_size": 16, "max_images": 3200, "noise_std": 0.1}, optim={"lr": 1e-3, "warmup_images": 320},
        checkpoint={"every_images": 800}, evaluation={"num_samples": 16, "grid": [2, 2]}, log={"every_steps": 5},
    )  # fmt: skip


@pytest.fixture
def verb():
    """`verb("submit", "config.yaml", "--run", ...)`: a verb of this room, called as the front door does; its errors are raised."""
    from tarflow.cli import parse

    def call(name: str, *words: object) -> int:
        args = parse([name, *(str(word) for word in words)])
        return args.command.run(args)

    return call


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """What tests with a mocked Slurm look at."""
    return tests.cluster.fake_slurm


@pytest.fixture
def fake_slurm(
    fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tests.cluster.fake_slurm.FakeSlurm]:
    """A Slurm of scripts on PATH, in the place of a real one."""
    made = fake.FakeSlurm(tmp_path / "fake", os.environ["PATH"])
    monkeypatch.setenv("PATH", made.path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield made
    made.kill()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A profile without the checks before the first step."""
    path = tmp_path / "plain.yaml"
    path.write_text("preflight: 'off'\n")
    return path


def live_slurm_conf() -> str | None:
    """The configuration of a Slurm that answers: from TARFLOW_SLURM_ENV (a file that start.sh wrote), or of this machine."""
    conf = os.environ.get("SLURM_CONF")
    if file := os.environ.get("TARFLOW_SLURM_ENV"):
        found = re.search(r"^export SLURM_CONF=(.+)$", Path(file).read_text(), re.MULTILINE)
        assert found, f"{file} sets no SLURM_CONF"
        conf = found[1]
    if shutil.which("sinfo") is None:
        return None
    env = {**os.environ, "SLURM_CONF": conf} if conf else None
    answered = subprocess.run(["sinfo", "-h"], capture_output=True, env=env, timeout=30).returncode == 0
    return (conf or "") if answered else None


@pytest.fixture
def slurm_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A live Slurm. Without one a test is skipped, but in CI (or with TARFLOW_REQUIRE_SLURM=1) that is a failure."""
    conf = live_slurm_conf()
    if conf is None:
        reason = "no Slurm answers (tests/cluster/slurm/start.sh DIR starts one; then TARFLOW_SLURM_ENV=DIR/env.sh)"
        if os.environ.get("CI") == "true" or os.environ.get("TARFLOW_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    if conf:
        monkeypatch.setenv("SLURM_CONF", conf)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield live
    subprocess.run(["sh", "-c", "squeue -h -o %A | sort -u | xargs -r scancel"], check=False)


PROFILE = """
cpus: 1
mem: 2G
time: 30
preflight: files
max_no_progress: 3
"""


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """The profile of jobs on the live cluster."""
    path = tmp_path / "profile.yaml"
    path.write_text(PROFILE)
    return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are kept that several tests compare with."""
    return tmp_path_factory.mktemp("reference")


@pytest.fixture
def two_tasks(verb) -> Callable[..., None]:
    """Submit a run of two nodes with a task each."""

    def submit(config: Path, run: Path, profile: Path, *more: object) -> None:
        words = ["--run", run, "--nodes", 2, "--tasks-per-node", 1, "--profile", profile]
        assert verb("submit", config, *more, *words) == 0

    return submit


@pytest.fixture
def uninterrupted(slurm_cluster, two_tasks, config_file, profile, shared: Path) -> Path:
    """The run that every interrupted one must equal; made once."""
    run = shared / "uninterrupted"
    if not run.exists():
        two_tasks(config_file, run, profile)
        assert slurm_cluster.ended(run)["ended"]["text"] == "finished at step 200 after 0 restarts"
    return run


FOUR_RANKS = ["parallel.backend=fsdp2", "train.max_images=1600"]


@pytest.fixture
def local_four(config_file, shared: Path) -> Path:
    """The same training by four processes under torchrun, without Slurm; made once."""
    run = shared / "local-four"
    if not run.exists():
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
        words = [*torchrun, "-m", "tarflow", "train", str(config_file), "--run-dir", str(run), *FOUR_RANKS]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How long the live cases took: in CI they have ten minutes."""
    entries = [entry for entries in terminalreporter.stats.values() for entry in entries]
    reports = [e for e in entries if hasattr(e, "duration") and "slurm" in e.keywords]
    calls = [r for r in reports if r.when == "call"]
    if calls:
        seconds = sum(r.duration for r in reports)
        terminalreporter.write_line(f"live Slurm: {len(calls)} cases in {seconds:.0f} s (of 600)")
