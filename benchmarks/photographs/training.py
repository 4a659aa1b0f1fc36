"""Training at equal compute, in slices: a run is stopped after some minutes and resumed by the same command, until it is done.

The budget is CPU seconds. What an image costs is measured first, by two short runs whose difference leaves out the start; the
run's length, on which its learning rate depends, follows from that. What it took in the end is measured too.
"""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.verbs import FINISHED, STOPPED, Ran, VerbFailedError, children_s, nested, overrides, run_verb
from tarflow.files import append_line, write_json, write_text

STEPS = (2, 14)  # steps of the two runs that measure the cost
_FRUITLESS = 3  # slices in a row without a checkpoint after which the limit is too short for this machine


@dataclass(frozen=True)
class Taken:
    """What a run took over all of its slices."""

    slices: int
    cpu_s: float
    wall_s: float
    finished: bool


def cost_of_image(config: Path, scratch: Path, batch: int, known: Path, steps: tuple[int, int] = STEPS) -> float:
    """CPU seconds per training image of this run, measured in `scratch` once and kept in the file `known`."""
    if known.is_file():
        return float(json.loads(known.read_text())["cpu_s_per_image"])
    used = []
    for number in steps:
        run = scratch / f"{config.stem}-{number}"  # of its own: another shell may be measuring another recipe
        shutil.rmtree(run, ignore_errors=True)
        short = {"train.max_images": number * batch, "checkpoint.every_images": 0, "optim.warmup_images": batch}
        used.append(run_verb(["train", config, "--run-dir", run, *overrides(short)], scratch / "cost.log").cpu_s)
        shutil.rmtree(run)
    cost = (used[1] - used[0]) / (steps[1] - steps[0]) / batch
    if cost <= 0:
        raise SystemExit(f"{config}: {steps[1]} steps took no more CPU seconds than {steps[0]}: {used}; run it again")
    write_json(known, {"cpu_s_per_image": cost, "cpu_s": used, "steps": steps, "batch": batch})
    return cost


def images_for(cpu_s: float, cost: float, batch: int) -> int:
    """The whole batches that a budget pays for; at least one."""
    return max(1, round(cpu_s / cost / batch)) * batch


def write_config(path: Path, settings: Mapping[str, Any]) -> Path:
    """The YAML file of a run. A run that began with other settings is not continued with these: SystemExit names both."""
    text = yaml.safe_dump(nested(settings), sort_keys=False)
    if path.is_file() and path.read_text() != text:
        raise SystemExit(f"{path} has other settings than this command: give another --out, or remove it and its run")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def train_in_slices(config: Path, run: Path, slice_s: float, say: bool = True) -> Taken:
    """Train to the end by `tarflow train`, stopped every `slice_s` seconds; goes on from what an earlier call left.

    Each slice is a line of RUN.slices.jsonl, written when it ends, also when this process is told to stop.
    """
    ledger = run.with_name(f"{run.name}.slices.jsonl")
    fruitless = 0
    while not (taken := taken_by(ledger)).finished:
        before = newest(run)
        used, begun = children_s(), time.monotonic()
        try:
            ran = run_verb(["train", config, "--run-dir", run], run.with_name(f"{run.name}.log"), slice_s)
        except BaseException:  # a slice that was cut short counts, too
            _note(ledger, Ran(STOPPED, children_s() - used, time.monotonic() - begun))
            raise
        _note(ledger, ran)
        if say:
            print(
                f"{run.name}: slice {taken.slices + 1}, {ran.cpu_s:.0f} CPU s, {ran.wall_s:.0f} s, {newest(run)}",
                flush=True,
            )
        fruitless = 0 if ran.code == FINISHED or newest(run) != before else fruitless + 1
        if fruitless == _FRUITLESS:
            raise VerbFailedError(
                f"{run}: {fruitless} slices of {slice_s:g} s left no checkpoint: use a longer --slice-minutes"
            )
    return taken


def _note(ledger: Path, ran: Ran) -> None:
    append_line(ledger, json.dumps(asdict(ran)))


def taken_by(ledger: Path) -> Taken:
    """The sum of a ledger; a run without one took nothing yet."""
    slices = [Ran(**json.loads(line)) for line in ledger.read_text().splitlines()] if ledger.is_file() else []
    return Taken(
        len(slices),
        sum(s.cpu_s for s in slices),
        sum(s.wall_s for s in slices),
        bool(slices) and slices[-1].code == FINISHED,
    )


def newest(run: Path) -> str:
    """The name of the newest checkpoint."""
    return max((path.name for path in (run / "checkpoints").glob("images-*")), default="no checkpoint")
