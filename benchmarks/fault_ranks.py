"""Ranks that are told how to die: forks of a process that has loaded torch, watched until they are gone.

As a program it does so on request: each line of its input is a start, in json (see `begin`), which it answers with a number,
or {"end": NUMBER}, which it answers with how that start ended (see `ended`). A start costs milliseconds that way, not the
seconds of loading torch, and ranks that hang until a limit may do so while others train.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.compute
import pyarrow.parquet  # noqa: F401 - and to this
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp  # all of it here, once, and not in every rank: it takes seconds

import tarflow.files
import tarflow.trainer.resilience.watchdog
import tarflow.trainer.train
from tarflow.trainer.config.files import load_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.hooks import Hook
from tarflow.trainer.resilience.fault_injection import VARIABLE
from tarflow.trainer.step_inputs import StepInput

RANKS = 2


def rank_main(config: Config, run_dir: Path, rank: int, ranks: int, port: int, fault: str) -> None:
    """One rank, in a fork; never returns. After every step it writes down which samples that step trained on."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), VARIABLE: fault}  # fmt: skip
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    notes, out = (os.open(beside(run_dir, name), flags) for name in ("trained.jsonl", "output.txt"))
    os.dup2(out, 1)
    os.dup2(out, 2)

    class NoteSamples(Hook):
        def on_step(self, step: int, batch: StepInput) -> None:  # noqa: ARG002 - the hook's signature
            os.write(notes, (json.dumps([batch.images_seen, rank, batch.ids.tolist()]) + "\n").encode())

    code = 1
    try:
        code = tarflow.trainer.train.train(config, run_dir, hooks=[NoteSamples()])
    except BaseException:  # noqa: BLE001 - whatever ends a rank is shown, and its exit code says that it ended
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def beside(run_dir: Path, name: str) -> Path:
    """A file that belongs to a run but lies outside of it, where its disk may be full."""
    return run_dir.parent.parent / f"{run_dir.name}-{name}"


class Life:
    """The ranks of one start, until they are all gone."""

    def __init__(self, config: Config, run_dir: Path, fault: str = "", ranks: int = RANKS) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.codes: dict[int, int] = {}
        self.port = port
        self.notes = beside(run_dir, "trained.jsonl")
        self.begin = self.notes.stat().st_size if self.notes.exists() else 0
        self.pids = {}
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                rank_main(config, run_dir, rank, ranks, port, fault)
            self.pids[rank] = pid

    def poll(self) -> bool:
        """Whether any rank has ended."""
        for rank, pid in self.pids.items():
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return bool(self.codes)

    def send(self, number: signal.Signals, ranks: Sequence[int]) -> None:
        for rank in ranks:
            if rank not in self.codes:
                os.kill(self.pids[rank], number)

    def lines(self) -> list[list[Any]]:
        """What this start has trained on until now."""
        if not self.notes.exists():
            return []
        with open(self.notes, "rb") as file:
            file.seek(self.begin)
            return [json.loads(line) for line in file.read().splitlines() if line.endswith(b"]")]

    def wait_for(self, steps: int, patience_s: float = 60) -> None:
        """Until rank 0 has trained so many steps, or a rank has ended."""
        self.wait_until(lambda: sum(line[1] == 0 for line in self.lines()) >= steps, patience_s)

    def wait_until(self, ready: Callable[[], bool], patience_s: float = 60) -> None:
        """Until something is so, or a rank has ended."""
        end = time.monotonic() + patience_s
        while not self.poll() and time.monotonic() < end and not ready():
            time.sleep(0.004)

    def end(self, grace_s: float, patience_s: float = 300) -> float:
        """Wait until all are gone; the seconds from the first death to the last.

        A rank that is still there after `grace_s` is killed, and the answer is infinite: it did not leave by itself. The
        same if none has ended after `patience_s`.
        """
        began, stayed = time.monotonic(), False
        while not self.poll():
            if time.monotonic() - began > patience_s:
                self.send(signal.SIGKILL, list(self.pids))
                stayed = True
            time.sleep(0.004)
        began = time.monotonic()
        while len(self.codes) < len(self.pids):
            if time.monotonic() - began > grace_s:
                self.send(signal.SIGKILL, list(self.pids))
                stayed = True
            time.sleep(0.004)
            self.poll()
        return float("inf") if stayed else time.monotonic() - began


def begin(order: dict[str, Any]) -> Life:
    """Start the ranks once.

    `config`: file; `overrides`; `run`; `ranks`; `fault`; `send`: [steps of rank 0, signal, ranks], ...
    `wait_for_file`: in the run directory, before the first of these. `full`: names in it, whose files take nothing more.
    `wait_for_steps`: of rank 0, or the end of a rank, before this answers.
    """
    config = load_config(Path(order["config"]), order.get("overrides", []), own=True)
    with full_disk(Path(order["run"]), order.get("full", [])):
        life = Life(config, Path(order["run"]), order.get("fault", ""), order.get("ranks", RANKS))
    if "wait_for_file" in order:  # in the run directory
        life.wait_until((Path(order["run"]) / order["wait_for_file"]).exists)
    for steps, name, ranks in order.get("send", []):
        life.wait_for(steps)
        life.send(signal.Signals[name], ranks)
    if "wait_for_steps" in order:
        life.wait_for(order["wait_for_steps"])
    return life


def ended(life: Life) -> dict[str, Any]:
    """Each rank's exit code and whether all left by themselves within a minute of the first that did."""
    seconds = life.end(grace_s=60, patience_s=60)
    codes = [life.codes[rank] for rank in sorted(life.codes)]
    return {"codes": codes, "by_themselves": seconds != float("inf"), "leftovers": helpers(life.port, patience_s=10)}


@contextlib.contextmanager
def full_disk(run_dir: Path, names: Sequence[str]) -> Iterator[None]:
    """Every write to some files fails for want of space, in processes that are forked meanwhile."""
    open_own = tarflow.files.open_own

    def opened(path: Path, flags: int, mode: int = 0o666) -> int:
        full = str(Path(path).relative_to(run_dir)) in names if Path(path).is_relative_to(run_dir) else False
        return os.open("/dev/full", os.O_RDWR) if full else open_own(path, flags, mode)

    with (
        mock.patch.object(tarflow.files, "open_own", opened),
        mock.patch.object(tarflow.trainer.resilience.watchdog, "open_own", opened),
    ):
        yield


def helpers(port: int, patience_s: float) -> list[int]:
    """Process ids of programs that these ranks have started and that outlive them (Linux only)."""
    mark, end = f"MASTER_PORT={port}\0".encode(), time.monotonic() + patience_s
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.05)


def main() -> int:
    torch.set_num_threads(1)
    gc.freeze()  # no rank looks through all that is loaded for garbage, nor copies the pages for it
    lives: list[Life] = []
    for line in sys.stdin:
        order = json.loads(line)
        if "end" in order:
            print(json.dumps(ended(lives[order["end"]])), flush=True)
        else:
            lives.append(begin(order))
            print(len(lives) - 1, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
