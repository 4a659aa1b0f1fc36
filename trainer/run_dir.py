"""The run directory: its layout, its only writer, and how to open one.

config.yaml  run.json  restarts.json  log.txt  logs/  metrics.jsonl  tensorboard/  wandb/  heartbeats/  checkpoints/  ema/
evals/  evals.jsonl  report.html
"""

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tarflow.files import append_line, fill, refuse_link, write_text
from tarflow.interpreter import JOB_VARIABLE
from tarflow.leases import holder, locked
from tarflow.records import DamagedFileError, Record, load_record, save_record, sealed
from tarflow.trainer.config.files import load_config, sealed_text
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError

LOCK = ".lock"  # held by the run's only writer

RunId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Words = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=300)]  # nothing that a terminal would obey


class Identity(Record):
    """run.json. The markers of the run's checkpoints record the same ID."""

    what = "identity of a run"
    way_out = (
        'restore it from a copy, or write {"run_id": "ID"} into it, with the ID that `run` in its '
        "checkpoints/*/COMMITTED says"
    )
    run_id: RunId


class LockFile(Record):
    """What the process that holds a run's lock writes into it."""

    what = "holder of a run"
    host: Words
    pid: int = Field(ge=0, lt=1 << 32)
    job: Words = ""


@dataclass(frozen=True)
class Holder:
    """The process that writes a run."""

    host: str
    pid: int
    job: str = ""  # Slurm's, if it runs in one

    @classmethod
    def of_this_process(cls) -> "Holder":
        """The current process, as it writes itself into the lock."""
        return cls(os.uname().nodename, os.getpid(), os.environ.get(JOB_VARIABLE, ""))

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}" + (f", Slurm job {self.job}" if self.job else "")


def is_run(run_dir: str | Path) -> bool:
    """Whether a directory was made by `tarflow train`."""
    return (Path(run_dir) / "run.json").is_file()


def has_run_file(run_dir: str | Path) -> bool:
    """Whether there is a run.json, readable or not: for commands that only show what there is."""
    return os.path.lexists(Path(run_dir) / "run.json")


def require_run(run_dir: str | Path) -> Path:
    """The path of an existing run. Raises TrainerError for anything else."""
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
    """The ID of a run. Its checkpoints carry it, so another run's leftovers are never mistaken for its own.

    Raises DamagedFileError.
    """
    return load_record(run_dir / "run.json", Identity).run_id


def create_run(run_dir: Path) -> None:
    """Make a directory a run, unless it is one already. A directory with other things in it is refused."""
    if is_run(run_dir):
        return
    # Hidden files do not count: the lock is ours, and a first start killed while it wrote run.json leaves one.
    leftovers = [p.name for p in run_dir.iterdir() if not p.name.startswith(".")] if run_dir.exists() else []
    if leftovers:
        raise TrainerError(
            f"--run-dir {run_dir} is not empty and not a run (it holds {leftovers[0]}); give a new directory"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_identity(run_dir, uuid.uuid4().hex)


def write_identity(run_dir: Path, run_id: str) -> None:
    """Write run.json: from now on the directory is a run."""
    save_record(run_dir / "run.json", Identity(run_id=run_id), shared=False)


def rank_log(run_dir: Path, rank: int) -> Path:
    """The log file of a rank."""
    return run_dir / "log.txt" if rank == 0 else run_dir / "logs" / f"rank-{rank:04d}.log"


def note(run_dir: Path, text: str) -> None:
    """Append a line to log.txt; from any rank, thread or supervising process."""
    append_line(run_dir / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")


def save_config(run_dir: Path, config: Config) -> None:
    """Record the resolved configuration of this start."""
    write_text(run_dir / "config.yaml", sealed_text(config))


@contextmanager
def writer_lock(run_dir: Path) -> Iterator[None]:
    """Hold a run as its only writer. The lock ends with the process, however it ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    # The writer removes files below these; through a link they would be somebody else's.
    for name in ("checkpoints", "ema", "ema/snapshots"):
        refuse_link(run_dir / name)
    path = run_dir / LOCK

    def lost() -> None:
        text = (
            f"FAILED: {path} is gone or held by another process, since this one was paused for too long; it has ended"
        )
        print(text, file=sys.stderr, flush=True)
        os._exit(1)  # at once: a save now would be a second writer's

    with locked(path, lasting=True, lost=lost) as mine:
        if not mine:
            who = holder(path, str(read_holder(run_dir) or ""))
            raise TrainerError(f"run {run_dir} is in use by another process ({who}); two writers would garble it")
        with suppress(OSError):  # a full disk
            fill(path, json.dumps(sealed(asdict(Holder.of_this_process()))))
        yield


def read_holder(run_dir: Path) -> Holder | None:
    """The process that took a run's lock last; None if unknown, as when the file is damaged (the lock still holds)."""
    try:
        said = load_record(run_dir / LOCK, LockFile)
    except (OSError, DamagedFileError):
        return None
    return Holder(said.host, said.pid, said.job)
