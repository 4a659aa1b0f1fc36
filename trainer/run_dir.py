"""The run directory: what lies where, who may write, and how to open one.

config.yaml  run.json  restarts.json  log.txt  logs/  metrics.jsonl  tensorboard/  heartbeats/  checkpoints/  ema/
evals/  evals.jsonl  report.html
"""

import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tarflow.files import append_line, write_text
from tarflow.trainer.config.files import config_text, load_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError


def is_run(run_dir: str | Path) -> bool:
    """Whether a directory was made by `tarflow train`."""
    return (Path(run_dir) / "run.json").is_file()


def require_run(run_dir: str | Path) -> Path:
    """The path of an existing run; anything else is a clear error."""
    path = Path(run_dir)
    if not path.is_dir():
        raise TrainerError(f"no run directory at {path}")
    if not is_run(path):
        raise TrainerError(f"{path} is not a run directory (no run.json in it); `tarflow train` makes one")
    return path


def load_run_config(run_dir: str | Path) -> Config:
    """The configuration that a run was last started with."""
    return load_config(require_run(run_dir) / "config.yaml")


def run_id(run_dir: Path) -> str:
    """The identity of a run: its checkpoints carry it, so another run's leftovers are never taken for its own."""
    return str(json.loads((run_dir / "run.json").read_text())["run_id"])


def create_run(run_dir: Path) -> None:
    """Make a directory a run, or leave it as it is if it is one. A directory with other things in it is refused."""
    if is_run(run_dir):
        return
    # The lock is ours; a file with the marker's temporary name is what a killed first start leaves.
    leftovers = [p.name for p in run_dir.iterdir() if not p.name.startswith(".")] if run_dir.exists() else []
    if leftovers:
        raise TrainerError(
            f"--run-dir {run_dir} is not empty and not a run (it holds {leftovers[0]}); give a new directory"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "run.json", json.dumps({"run_id": uuid.uuid4().hex}))


def rank_log(run_dir: Path, rank: int) -> Path:
    """Where a rank writes for people."""
    return run_dir / "log.txt" if rank == 0 else run_dir / "logs" / f"rank-{rank:04d}.log"


def note(run_dir: Path, text: str) -> None:
    """Append a line to log.txt, from any rank, thread or supervisor."""
    append_line(run_dir / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")


def save_config(run_dir: Path, config: Config) -> None:
    """Record the resolved configuration of this start."""
    write_text(run_dir / "config.yaml", config_text(config))


@contextmanager
def writer_lock(run_dir: Path) -> Iterator[None]:
    """Hold a run as its only writer. The lock ends with the process, however it ends (case C10)."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise TrainerError(
                f"run {run_dir} is in use by another process ({file.read().strip()}); two writers would garble it"
            ) from None
        file.truncate(0)
        file.write(f"host {os.uname().nodename}, pid {os.getpid()}")
        file.flush()
        yield
