"""Weights & Biases, from a process of its own.

The library registers exit handlers, replaces `sys.exit` and may wait for its server without end. So the training never
imports it: it sends points to a child process, which it can leave behind.
"""

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from tarflow.errors import in_words
from tarflow.files import make_folder
from tarflow.interpreter import child_environment, module_command
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.tracking.tensorboard import flat
from tarflow.trainer.tracking.tracker import Point, Tracker

FOLDER = "wandb"
INSTALL = "pip install 'tarflow[wandb]'"


@dataclass(frozen=True)
class Place:
    """Where a run's points go: `log.wandb`, `log.wandb_project` and `log.wandb_entity` of its configuration."""

    mode: str
    project: str
    entity: str | None = None


class WeightsAndBiases(Tracker):
    """Logs to one W&B run, whose id is the run's own: a resumed training continues it.

    The evaluation has a W&B run beside it, in the same group, since a W&B run has one writer. Sent are settings, metrics and
    pictures, with the versions and the host that the library notes; neither code nor output nor system metrics.
    """

    name, switch, closing_s = "Weights & Biases", "log.wandb=disabled turns it off", 30.0

    def __init__(self, run_dir: Path, run_id: str, place: Place, job: str = "training") -> None:
        make_folder(run_dir, FOLDER)
        self._run_dir, self._run_id, self._place, self._job = run_dir.absolute(), run_id, place, job
        self._process: subprocess.Popen[str] | None = None

    def begin(self, images_seen: int, settings: Mapping[str, Mapping[str, Any]]) -> None:  # noqa: ARG002 - the interface
        """Start or continue the W&B run. Points that it has already past `images_seen` stay as they were first logged."""
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, this package
            module_command("tarflow.trainer.tracking.wandb_process"), env=child_environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        training, name = self._job == "training", self._run_dir.resolve().name
        init = {
            "project": self._place.project, "entity": self._place.entity, "mode": self._place.mode,
            "id": self._run_id if training else f"{self._run_id}-{self._job}", "resume": "allow",
            "name": name if training else f"{name} {self._job}", "group": f"{name} {self._run_id[:8]}",
            "job_type": self._job, "dir": str(self._run_dir), "config": flat(settings),
        }  # fmt: skip
        try:
            self._ask({"do": "begin", "init": init})
        except Exception:
            self.abandon()
            raise

    def log(self, point: Point) -> None:
        """Log a point by its images seen. Of a training, W&B keeps the first point of a number of images; it drops others."""
        values = {name: value for name, value in point.values.items() if value is not None}
        self._ask({
            "do": "log", "values": {"step": point.step, "images_seen": point.images_seen, **values},
            "pictures": {tag: str(path) for tag, path in point.pictures.items()},
            "step": point.images_seen if self._job == "training" else None,  # results come in any order
        })  # fmt: skip

    def close(self) -> None:
        """Have it send what is left."""
        try:
            self._ask({"do": "finish"})
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End the child, whatever it waits for. What it has not sent is in RUN/wandb/, for `wandb sync`."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def _ask(self, order: dict[str, Any]) -> None:
        if self._process is None:  # it did not begin, which was said
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError as error:
            answer = json.dumps(f"its process has ended ({in_words(error)})")
        problem = json.loads(answer) if answer else "its process has ended"
        if problem:
            raise TrainerError(str(problem))


def check_wandb(mode: str) -> None:
    """Raises TrainerError, with what to do, if W&B cannot be used as `log.wandb` says."""
    if mode == "disabled":
        return
    spec = find_spec("wandb")
    if spec is None or spec.origin is None:  # without an origin: a folder of that name, such as W&B's own files
        raise TrainerError(f"log.wandb={mode} needs the package wandb: {INSTALL}, or set log.wandb=disabled")
    if mode == "online" and not _has_key():
        raise TrainerError(
            "log.wandb=online finds no key: run `wandb login` or set WANDB_API_KEY; log.wandb=offline needs none, and "
            "`wandb sync` sends its files later"
        )


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        hosts = netrc(os.environ.get("NETRC") or None).hosts
    except (OSError, NetrcParseError, RuntimeError):  # there is none, or no home folder
        return False
    return any(name == host or "wandb" in name for name in hosts)
