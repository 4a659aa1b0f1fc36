"""Every verb against what goes wrong around it.

`python -m tests.helpers.message_table FOLDER [WORD]` prints verb x fault -> exit code and message, and writes
FOLDER/table.json. WORD: only rows with it.

Runs in one process, in a mount namespace of its own where that is allowed: a full disk and a read-only one are real then.
Otherwise the limit on the size of files and a folder without permissions stand in for them.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tarflow.cli

NOBODY = 65534
MODEL = {"image_size": 8, "patch_size": 4, "in_channels": 1, "channels": 16, "num_blocks": 2, "layers_per_block": 1,
         "head_channels": 8, "num_classes": 3}  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """How a verb is called: `{out}` is what it writes, `{run}` a run, the rest what it reads."""

    call: str
    out: str = ""  # file | folder: what {out} is; run: it writes into {run}
    suffix: str = ""
    inputs: str = ""  # names that stand for something that is read, with their kind: `images/folder`


VERBS = {
    "data prepare": Verb("images {out} --size 8", "folder", inputs="images/folder"),
    "data fetch": Verb("mnist5k {out} --source digits.gz", "folder", inputs="digits.gz/file"),
    "data index": Verb("set/train --out {out}", "folder", inputs="set/train/folder"),
    "data info": Verb("set/train --sheet {out}", "file", ".png", inputs="set/train/folder"),
    "data verify": Verb("set/train --processes 1 --report {out}", "file", ".json", inputs="set/train/folder"),
    "train": Verb("tiny.yaml --run-dir {out}", "folder", inputs="tiny.yaml/file"),
    "train (resumed)": Verb("tiny.yaml --run-dir {run} train.max_images=96", "run", inputs="{run}/folder"),
    "train --init-from": Verb("tiny.yaml --run-dir {out} --init-from w.safetensors", "folder", inputs="w.safetensors/file"),
    "ema": Verb("{run} --relative-std 0.11 --out {out}", "file", ".safetensors", inputs="{run}/folder"),
    "ema (in the run)": Verb("{run} --relative-std 0.11", "run"),
    "checkpoint list": Verb("{run}", inputs="{run}/folder"),
    "checkpoint verify": Verb("{run}", inputs="{run}/folder"),
    "checkpoint export": Verb("{run} --out {out}", "file", ".safetensors", inputs="{run}/folder"),
    "checkpoint export (pth)": Verb("{run} --out {out}", "file", ".pth"),
    "checkpoint export (folder)": Verb("{run} --out {out} --format hf", "folder"),
    "checkpoint prune": Verb("{run} --keep-latest 2", "run", inputs="{run}/folder"),
    "checkpoint rewind": Verb("{run} --images 48", "run", inputs="{run}/folder"),
    "evaluate": Verb("{run} --newest", "run", inputs="{run}/folder"),
    "evaluate (weights)": Verb("w.safetensors --out {out} data.train=set/train train.noise_std=0.1 evaluation.num_samples=8"
                               " evaluation.grid=[2,2]", "folder", inputs="w.safetensors/file"),
    "likelihood": Verb("{run} set/train --out {out}", "folder", inputs="{run}/folder set/train/folder"),
    "encode": Verb("{run} set/train --out {out}", "folder", inputs="{run}/folder set/train/folder"),
    "decode": Verb("{run} lat --out {out}", "folder", inputs="{run}/folder lat/folder"),
    "sample": Verb("{run} --out {out} --num 2", "folder", inputs="{run}/folder"),
    "sample (weights)": Verb("w.safetensors --out {out} --num 2 --noise-std 0.1", "folder", inputs="w.safetensors/file"),
    "sweep-guidance": Verb("{run} --guidance 0,1 --start 4 --final 8", "run", inputs="{run}/folder"),
    "reference": Verb("set/train --size 8 --channels 1 --out {out}", "file", ".npz", inputs="set/train/folder"),
    "score": Verb("images --against images/a --size 8 --out {out}", "file", ".json", inputs="images/folder images/a/folder"),
    "report": Verb("{run} --out {out}", "file", ".html", inputs="{run}/folder"),
    "report (in the run)": Verb("{run}", "run"),
    "submit": Verb("tiny.yaml --run-dir {out} --profile profile.yaml", "folder", inputs="tiny.yaml/file profile.yaml/file"),
    "submit-eval": Verb("{run}", "run", inputs="{run}/folder"),
    "status": Verb("{run}", inputs="{run}/folder"),
    "cancel": Verb("{run}", "run", inputs="{run}/folder"),
    "logs": Verb("{run}", inputs="{run}/folder"),
}  # fmt: skip
if "init" in tarflow.cli.VERBS:
    VERBS["init"] = Verb("set --out {out}", "file", ".yaml", inputs="set/folder")


@dataclass
class Outcome:
    verb: str
    fault: str
    code: int | None  # None: an exception came through
    message: str
    left: list[str]  # what was half-written


# --- what the verbs work on ------------------------------------------------------------------------------------------


def make_inputs(home: Path) -> None:
    """Everything that VERBS names, small, in `home`, which is the current folder."""
    import yaml
    from PIL import Image

    from tarflow.models.config import TarFlowConfig
    from tarflow.models.flow import TarFlow
    from tarflow.models.weights import save_weights_file

    rng = np.random.default_rng(0)
    for number in range(24):
        path = Path("images", "abc"[number % 3], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
    rows = io.StringIO()
    for number in range(40):
        csv.writer(rows).writerow([number] * 784 + [number % 10])
    Path("digits.gz").write_bytes(gzip.compress(rows.getvalue().encode()))
    tree = {
        "data": {"train": str(home / "set/train"), "validation": str(home / "set/val")},
        "model": MODEL,
        "train": {"global_batch_size": 8, "max_images": 64, "noise_std": 0.1},
        "optim": {"lr": 1e-3, "warmup_images": 32},
        "checkpoint": {"every_images": 16, "keep_latest": -1},
        "ema": {"relative_stds": [0.1], "snapshot_every_images": 16},
        "log": {"every_steps": 4, "tensorboard": False},
        "evaluation": {"num_samples": 8, "grid": [2, 2], "validation_images": 4, "neighbour_images": 8},
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(tree))
    Path("profile.yaml").write_text("time: 10\npreflight: 'off'\n")
    Path("a_file").write_text("text\n")
    Path("a_folder").mkdir()
    model = TarFlow(TarFlowConfig(**MODEL))
    save_weights_file("w.safetensors", model.config, model.state_dict())
    for name in ("sbatch", "srun", "scontrol", "squeue", "sacct", "scancel"):
        tool = Path("bin", name)
        tool.parent.mkdir(exist_ok=True)
        tool.write_text("#!/bin/sh\n" + ("echo Submitted batch job 7\n" if name == "sbatch" else "exit 0\n"))
        tool.chmod(0o755)
    os.environ["PATH"] = f"{home / 'bin'}:{os.environ['PATH']}"
    for words in ("data prepare images set --size 8 --val-fraction 0.2", "train tiny.yaml --run-dir run",
                  "encode run set/val --out lat"):  # fmt: skip
        assert call(words.split()).code == 0, words
    for path in (Path("run"), *Path("run").rglob("*")):  # whoever may not write may read
        path.chmod(0o777 if path.is_dir() else 0o666)
    Path("run/slurm").mkdir()
    Path("run/slurm/jobs.jsonl").write_text(json.dumps({"job": "7", "kind": "train", "logs": "x", "time": 0}) + "\n")


def call(argv: list[str], verb: str = "", fault: str = "") -> Outcome:
    """A verb through the front door, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: int | None
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = tarflow.cli.main(argv)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:  # noqa: BLE001 - a row of the table, whatever it is
            code = None
            err.write(f"TRACEBACK {type(error).__name__}: {error}")
    message = err.getvalue().strip()
    if not message and code:
        message = "(stdout) " + out.getvalue().strip().splitlines()[-1] if out.getvalue().strip() else ""
    return Outcome(verb, fault, code, message, [])


# --- what goes wrong ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, where this is root."""
    if os.geteuid() != 0 or os.environ.get("TABLE_NAMESPACE") == "user":
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond some bytes, where there is no full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


class Places:
    """Folders that cannot be written, each in its way."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.mounted = os.environ.get("TABLE_NAMESPACE", "none") != "none"
        self.contexts: dict[str, Callable[[], Any]] = {
            "read-only": contextlib.nullcontext,
            "full": contextlib.nullcontext,
        }
        for name in ("read-only", "full", "locked"):
            (home / name).mkdir()
        if self.mounted:
            for name in ("read-only", "full"):
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m,mode=777", "tarflow", home / name], check=True)
        for name in ("read-only", "full", "locked"):
            shutil.copytree(home / "run", home / name / "run")
        if self.mounted:
            subprocess.run(["mount", "-o", "remount,ro", home / "read-only"], check=True)
            self.fill()
        else:
            self.contexts = {"read-only": nobody, "full": small_files}
            for path in (home / "read-only", *(home / "read-only").rglob("*")):
                if path.is_dir():
                    path.chmod(0o555)
        for path in (home / "locked", *(home / "locked").rglob("*")):
            if path.is_dir():
                path.chmod(0o555)
        self.contexts["locked"] = nobody

    def fill(self) -> None:
        """Use up what is free of the full disk, to the last byte."""
        with (
            open(self.home / "full" / f"filler-{time.monotonic_ns()}", "wb", buffering=0) as file,
            contextlib.suppress(OSError),
        ):
            while file.write(b"\0" * 4096):
                pass

    def unfill(self) -> None:
        for path in (self.home / "full").glob("filler-*"):
            path.unlink()


def outcomes(home: Path, only: str = "") -> Iterator[Outcome]:
    """Every row."""
    places = Places(home)
    number = 0
    for verb, how in VERBS.items():
        words = [word for word in verb.partition(" (")[0].split() if not word.startswith("-") and not word.isdigit()]

        def argv(run: str = "run", out: str = "", swap: tuple[str, str] = ("", "")) -> list[str]:
            parts = [part.format(run=run, out=out) for part in how.call.split()]  # noqa: B023
            return words + [swap[1] if swap[0] and part == swap[0] else part for part in parts]  # noqa: B023

        rows: list[tuple[str, list[str], Callable[[], Any]]] = []
        plain = contextlib.nullcontext

        def fresh() -> str:
            nonlocal number
            number += 1
            return f"out-{number}{how.suffix}"  # noqa: B023

        for item in how.inputs.split():
            name, _, kind = item.rpartition("/")
            name = name.format(run="run")
            if verb != "train (resumed)":
                rows.append((f"missing {kind}", argv(out=fresh(), swap=(name, "nowhere/" + Path(name).name)), plain))
            other = "a_file" if kind == "folder" else "a_folder"
            rows.append((f"{kind} is a {other[2:]}", argv(out=fresh(), swap=(name, other)), plain))
        if how.out in ("file", "folder") and not verb.startswith("train --"):
            other = "a_file" if how.out == "folder" else "a_folder"
            if how.suffix and how.out == "file":
                other = f"a_folder{how.suffix}"
                Path(other).mkdir(exist_ok=True)
            rows.append((f"output is a {other[2:].split('.')[0]}", argv(out=other), plain))
            rows.append(("output below a file", argv(out=f"a_file/{fresh()}"), plain))
        if how.out != "run" and "{run}" in how.call:
            rows.append(("run is read-only", argv(run="read-only/run", out=fresh()), plain))
        variant = "(" in verb and verb != "train (resumed)"  # goes the same way in the end
        for place in (
            () if verb.startswith("train --") else ("read-only",) if variant else ("locked", "read-only", "full")
        ):
            if how.out == "run":
                rows.append((place, argv(run=f"{place}/run"), places.contexts[place]))
            elif how.out:
                rows.append((place, argv(out=f"{place}/{fresh()}"), places.contexts[place]))
        if only and only not in verb and not any(only == fault for fault, _, _ in rows):
            continue
        for fault, command, context in rows:
            if only and only not in verb and only != fault:
                continue
            before = files(home)
            with context():
                row = call(command, verb, fault)
            new = files(home) - before
            row.left = sorted(half_written(new, home))
            clear(new)
            if fault == "full" and places.mounted:
                places.unfill()
                places.fill()
            yield row


def files(home: Path) -> set[str]:
    """Everything below a folder; as text, for there are thousands to look at for each row."""
    return {
        os.path.join(parent, name)
        for parent, folders, names in os.walk(home)
        for name in folders + names
        if "filler" not in name
    }


def half_written(new: set[str], home: Path) -> Iterator[str]:
    """What a refused command has left: nothing that looks like a result, and nothing on its way to one."""
    for path in map(Path, new):
        if path.name.endswith((".tmp", ".partial", ".gone")) or path.suffix in (
            ".png",
            ".npz",
            ".safetensors",
            ".pth",
            ".html",
        ):
            yield str(path.relative_to(home))


def clear(new: set[str]) -> None:
    for path in sorted(map(Path, new), reverse=True):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def interrupted(home: Path, only: str = "") -> Iterator[Outcome]:
    """Ctrl-C at three moments of each verb: the moments are shares of how long it takes when left alone."""
    for number, (verb, how) in enumerate(VERBS.items()):
        if (only and only not in verb) or "(" in verb or verb.startswith("train --"):
            continue
        words = [word for word in verb.partition(" (")[0].split() if not word.startswith("-")]
        seconds = 0.0
        for moment in (None, 0.3, 0.8):
            before = files(home)
            run = f"stop-{number}-{moment}/run"
            shutil.copytree("run", run)
            out = f"stop-{number}-{moment}/out{how.suffix}"
            argv = words + [part.format(run=run, out=out) for part in how.call.split()]
            began = time.monotonic()
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the verb begins
            timer = threading.Timer((moment or 0) * seconds, os.kill, (os.getpid(), signal.SIGINT))
            if moment is not None:
                timer.start()
            row = call(argv, verb, f"Ctrl-C after {moment} of it")
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            timer.cancel()
            seconds = seconds or time.monotonic() - began
            # What was on its way out (`.gone`) is no harm: the next start sweeps it.
            new = files(home) - before
            row.left = [name for name in half_written(new, home) if name.endswith((".tmp", ".partial"))]
            clear(new)
            if moment is not None:
                yield row


def main() -> None:
    home, only = Path(sys.argv[1]).resolve(), "".join(sys.argv[2:3])
    if "TABLE_NAMESPACE" not in os.environ:
        for name, flags in (("root", "-m"), ("user", "-rm")):
            if (
                subprocess.run(["unshare", flags, "sh", "-c", "mount -t tmpfs x /mnt"], capture_output=True).returncode
                == 0
            ):
                os.execvpe("unshare", ["unshare", flags, *sys.orig_argv], os.environ | {"TABLE_NAMESPACE": name})
    import torch

    import tarflow.evaluation.references.make
    import tarflow.evaluation.worker.real_images
    import tarflow.evaluation.worker.score_folder
    from tests.evaluation.conftest import FakeFeatures

    for module in (
        tarflow.evaluation.references.make,
        tarflow.evaluation.worker.real_images,
        tarflow.evaluation.worker.score_folder,
    ):
        module.Features = FakeFeatures  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o755)
    os.chdir(home)
    make_inputs(home)
    table = []
    for row in itertools.chain(outcomes(home, only), interrupted(home, only)):
        table.append(vars(row))
        print(f"{row.verb:26} {row.fault:24} {'!!' if row.code is None else row.code:>3}  {row.message}"
              + (f"  LEFT: {row.left}" if row.left else ""), flush=True)  # fmt: skip
    (home / "table.json").write_text(json.dumps(table))


if __name__ == "__main__":
    main()
