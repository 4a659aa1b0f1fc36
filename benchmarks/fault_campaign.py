"""Two hundred deaths in one training run, and then the same bits as the run that was left alone.

Two ranks on the CPU, a small model, asynchronous saves every few steps. Again and again something goes wrong: SIGKILL of
one rank or of both, at a random moment or at a chosen point inside a save; SIGTERM, SIGUSR2; a disk that fills up while a
save is written; a newest checkpoint with damaged bytes. Each time the same command is started again. In the end the
weights, moments and averages must equal the uninterrupted run's to the last bit, the log of trained samples must hold every
sample once per epoch, and no start may have repeated more than the work since the last commit.

Ranks are forks of this process, which has loaded torch and has no threads: a start costs milliseconds, not seconds.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Bar, finish, parse_args
from benchmarks.data_images import scratch
from benchmarks.fault_ranks import Life, beside
from tarflow.data_pipeline.loading.order import Order
from tarflow.data_pipeline.prepare.sources import open_source
from tarflow.data_pipeline.prepare.write import Options, prepare
from tarflow.data_pipeline.storage.open_index import open_index
from tarflow.trainer.checkpoint.find import committed, find, newest_intact, scan
from tarflow.trainer.config.schema import Config
from tarflow.trainer.resilience.exit_codes import FINISHED, REQUEUE

BATCH, IMAGES, EVERY_STEPS = 8, 96, 3
KINDS = (
    "kill one rank", "kill all ranks", "kill inside a save", "SIGTERM", "SIGUSR2", "full disk", "damaged newest checkpoint",
)  # fmt: skip
WEIGHTS = (4, 3, 6, 2, 2, 1, 2)
POINTS = ("save.begin", "save.staged", "save.written", "save.renamed", "save.marked", "save.pointed")


def make_data(folder: Path) -> Path:
    """96 grey images of 8 px in three classes."""
    noise = np.random.default_rng(0)
    images = noise.integers(0, 256, (IMAGES, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(IMAGES) % 3)
    prepare(open_source(folder / "images.npz"), folder / "set", Options(size=8, shard_size=40))
    return folder / "set"


def make_config(data: Path, steps: int) -> Config:
    return Config.model_validate(
        {
            "data": {"train": data},
            "model": {"image_size": 8, "patch_size": 2, "in_channels": 1, "channels": 64, "num_blocks": 2,
                      "layers_per_block": 1, "num_classes": 3},
            "train": {"global_batch_size": BATCH, "max_images": steps * BATCH, "param_dtype": "float32", "device": "cpu",
                      "max_restarts_without_progress": 0},
            "optim": {"warmup_images": 64},
            "parallel": {"backend": "fsdp2", "start_timeout_s": 15, "step_timeout_s": 15},
            "checkpoint": {"every_images": EVERY_STEPS * BATCH, "keep_latest": 3},
            "log": {"every_steps": 5, "tensorboard": False},
        }
    )  # fmt: skip


@dataclass
class Tally:
    """What the campaign counts."""

    kinds: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)  # where a save was really killed
    codes: Counter[int] = field(default_factory=Counter)  # how ranks ended
    deaths: int = 0
    slowest_s: float = 0.0
    wrong_codes: int = 0
    wrong_starts: int = 0  # starts that did not begin at the newest whole checkpoint
    pointer_ahead: int = 0
    pointer_damaged: int = 0  # it names a checkpoint that was damaged after it was committed
    damaged: dict[str, int] = field(default_factory=dict)  # name -> inode of its marker, of those damaged here
    torn: int = 0  # directories without a marker that were left behind, and never used
    refused_saves: int = 0  # by a full disk
    repeated: list[int] = field(default_factory=list)  # steps, per start


def newest(run_dir: Path) -> int:
    """Position of the newest checkpoint whose bytes are whole."""
    found = newest_intact(run_dir, lambda _: None) if (run_dir / "run.json").exists() else None
    return found.images_seen if found else 0


def look(run_dir: Path, tally: Tally) -> None:
    """What a death left behind: the pointer must name a committed checkpoint, torn directories are counted."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return
    usable, refused = scan(run_dir)
    pointer = folder / "latest"
    if pointer.exists() and (name := pointer.read_text().strip()) not in {c.name for c in usable}:
        # Excused if that very checkpoint was whole until it was damaged here, and no start has come to look at it since.
        marker = folder / name / "COMMITTED"
        excused = marker.exists() and tally.damaged.get(name) == marker.stat().st_ino
        tally.pointer_damaged += excused
        tally.pointer_ahead += not excused
    tally.torn += len(refused)


def damage(run_dir: Path, dice: random.Random, tally: Tally) -> None:
    """Flip a bit of the newest checkpoint, cut a file short, or lose one."""
    for old in (run_dir / "checkpoints").glob("*.damaged"):  # looked at, as it were: the disk is small
        shutil.rmtree(old)
    victim = committed(run_dir)[-1].path
    tally.damaged[victim.name] = (victim / "COMMITTED").stat().st_ino
    file = dice.choice(sorted(p for p in victim.iterdir() if p.suffix == ".distcp"))
    how = dice.choice(["flip", "cut", "lose"])
    if how == "flip":
        content = bytearray(file.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        file.write_bytes(content)
    elif how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()


def disaster(
    kind: str, point: str, config: Config, run_dir: Path, dice: random.Random, tally: Tally, small_disk: bool
) -> Life:
    """One start and its end. `point`: of a save, where it is to be killed."""
    fault = ""
    victims = dice.choice([[0], [1], [0, 1]])
    if kind == "kill inside a save":
        rank = dice.choice(["/0", "/1", ""]) if point in ("save.staged", "save.written") else ""
        fault = f"{point}@{dice.choice([1, 1, 2])}{rank}=kill"
    elif kind == "full disk" and not small_disk:
        fault = f"save.written@{dice.choice([1, 2])}{dice.choice(['/0', '/1', ''])}=nospace"
    life = Life(config, run_dir, fault)
    if kind == "kill inside a save":
        life.wait_for(10**9)
    elif kind == "full disk":
        fill_disk(life, run_dir, small_disk, tally)
        life.send(signal.SIGTERM, victims)
    else:
        life.wait_for(dice.choice([0, 0, 1, 2, 3, 4, 6, 9]))
        time.sleep(dice.uniform(0, 0.25))
        if kind in ("SIGTERM", "SIGUSR2"):
            life.wait_for(1)  # before the handlers are there, a signal is a plain kill
            life.send(signal.SIGTERM if kind == "SIGTERM" else signal.SIGUSR2, victims)
        else:
            life.send(signal.SIGKILL, [dice.choice([0, 1])] if kind == "kill one rank" else [0, 1])
    tally.slowest_s = max(tally.slowest_s, life.end(grace_s=60))
    tally.codes.update(life.codes.values())
    if kind == "kill inside a save":
        tally.points[point] += -signal.SIGKILL in life.codes.values()
    if kind in ("SIGTERM", "SIGUSR2", "full disk"):
        tally.wrong_codes += set(life.codes.values()) not in ({REQUEUE}, {FINISHED})
    look(run_dir, tally)
    if kind == "damaged newest checkpoint" and len(committed(run_dir)) > 1:
        damage(run_dir, dice, tally)
    return life


def fill_disk(life: Life, run_dir: Path, small_disk: bool, tally: Tally) -> None:
    """Let one save fail for want of space, then make room again."""
    life.wait_for(1)
    ballast = run_dir.parent / "ballast"
    if small_disk and run_dir.exists():
        free = shutil.disk_usage(run_dir).free
        with contextlib.suppress(OSError), open(ballast, "wb") as file:
            file.write(bytes(max(0, free - 400_000)))  # room for logs, not for a checkpoint
    failed = (run_dir / "log.txt").read_text().count("WARNING: saving step")
    end = time.monotonic() + 30
    while not life.poll() and time.monotonic() < end:
        if (run_dir / "log.txt").read_text().count("WARNING: saving step") > failed:
            tally.refused_saves += 1
            break
        time.sleep(0.01)
    ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def run_folder(folder: Path) -> Iterator[bool]:
    """`folder` as a small disk of its own, where this process may mount one; tells whether it is."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True
    ).returncode == 0  # fmt: skip
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=False)


def every_tensor(run_dir: Path) -> dict[str, torch.Tensor]:
    """All of the newest checkpoint: weights, averages, moments, counters."""
    import torch.distributed.checkpoint as dcp

    newest = find(run_dir)
    metadata = dcp.FileSystemReader(newest.path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}  # type: ignore[union-attr]
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(newest.path), no_dist=True)
    return tensors


def campaign(config: Config, run_dir: Path, kills: int, small_disk: bool) -> Tally:
    """All the disasters, then one start that is left alone."""
    dice, tally = random.Random(1), Tally()
    most = config.train.max_images - 12 * BATCH
    deck: list[tuple[str, str]] = []
    frontier = 0  # the farthest position that was ever trained to
    while tally.deaths < kills:
        if newest(run_dir) >= most:
            break
        expected = newest(run_dir)
        if not deck:  # every twenty deaths hold every kind, and every point of a save
            points = iter(POINTS)
            deck = [
                (kind, next(points) if kind == "kill inside a save" else "")
                for kind, weight in zip(KINDS, WEIGHTS)
                for _ in range(weight)
            ]
            dice.shuffle(deck)
        kind, point = deck.pop()
        life = disaster(kind, point, config, run_dir, dice, tally, small_disk)
        tally.deaths += 1
        tally.kinds[kind] += 1
        lines = life.lines()
        if lines:
            tally.wrong_starts += lines[0][0] != expected
            tally.repeated.append(max(0, frontier - expected) // BATCH)
            frontier = max(frontier, max(line[0] for line in lines) + BATCH)
        if tally.deaths % 20 == 0:
            print(f"{tally.deaths} deaths, {newest(run_dir) // BATCH} steps committed", file=sys.stderr, flush=True)
    last = Life(config, run_dir)
    last.end(grace_s=30)
    tally.wrong_codes += set(last.codes.values()) != {FINISHED}
    return tally


def order_errors(config: Config, run_dir: Path) -> int:
    """Samples trained not exactly once per epoch, or out of order: every position, both ranks, every repetition."""
    index = open_index(config.data.train)
    order = Order(index.shard_sizes, seed=config.train.seed, shuffle_block=config.data.shuffle_block)
    seen: dict[int, dict[int, tuple[int, ...]]] = {}
    wrong = 0
    for text in beside(run_dir, "trained.jsonl").read_text().splitlines():
        position, rank, ids = json.loads(text)
        before = seen.setdefault(position, {}).setdefault(rank, tuple(ids))
        wrong += before != tuple(ids)  # what is repeated after a death is the same
    per_epoch: dict[int, Counter[int]] = {}
    for position in range(0, config.train.max_images, BATCH):
        got = sorted(i for part in seen.get(position, {}).values() for i in part)
        wrong += got != sorted(order.batch(position, BATCH).tolist())
        per_epoch.setdefault(position // IMAGES, Counter()).update(got)
    wrong += sum(set(count.values()) != {1} or len(count) != IMAGES for count in per_epoch.values())
    return wrong


def table(tally: Tally, steps: int, log: str, real_disk: bool, seconds: float, alone: float) -> list[tuple[str, str]]:
    """What happened, a line each."""
    rows = [(kind, str(tally.kinds[kind])) for kind in KINDS]
    rows += [(f"  at {point}", str(tally.points[point])) for point in POINTS]
    rows += [
        ("deaths in all", str(tally.deaths)),
        ("exit codes of ranks", ", ".join(f"{code}: {count}" for code, count in sorted(tally.codes.items()))),
        ("steps of the run", f"{steps} ({steps * BATCH // IMAGES} epochs)"),
        ("steps repeated per start, mean / most", f"{np.mean(tally.repeated):.1f} / {max(tally.repeated)}"),
        ("torn directories met, never used", str(tally.torn)),
        ("saves refused by a full disk", f"{tally.refused_saves} ({'a real one' if real_disk else 'injected'})"),
        ("damaged checkpoints skipped", str(log.count("is damaged and not used") + log.count("is not used: its file"))),
        ("pointer found at one damaged here", str(tally.pointer_damaged)),
        ("seconds, with deaths / left alone", f"{seconds:.0f} / {alone:.0f}"),
    ]  # fmt: skip
    return rows


def main() -> int:
    args = parse_args(
        __doc__.splitlines()[0],
        [
            ("--kills", {"type": int, "default": 200, "help": "how many deaths (--quick: 20)"}),
            ("--keep-log", {"type": Path, "metavar": "FILE", "help": "keep the run's log and output"}),
        ],
    )
    kills = 20 if args.quick else args.kills
    steps = -(-4 * kills // 12) * 12 + 24  # whole epochs
    torch.set_num_threads(1)
    with scratch() as where:
        pid = os.fork()  # preparing starts threads, and this process must have none
        if pid == 0:
            make_data(where)
            os._exit(0)
        os.waitpid(pid, 0)
        config = make_config(where / "set", steps)
        with run_folder(where / "left-alone"), run_folder(where / "disk") as small_disk:
            began = time.monotonic()
            reference = Life(config, where / "left-alone" / "reference")
            reference.end(grace_s=60)
            assert set(reference.codes.values()) == {FINISHED}, (where / "reference-output.txt").read_text()[-3000:]
            alone = time.monotonic() - began
            began = time.monotonic()
            tally = campaign(config, where / "disk" / "run", kills, small_disk)
            seconds = time.monotonic() - began
            ours, theirs = every_tensor(where / "disk" / "run"), every_tensor(where / "left-alone" / "reference")
            different = [n for n in theirs if n not in ours or not torch.equal(ours[n], theirs[n])]
            log = (where / "disk" / "run" / "log.txt").read_text()
            errors = order_errors(config, where / "disk" / "run")
            output = (where / "run-output.txt").read_text()
            if args.keep_log:
                args.keep_log.write_text(log + output)
    rows = table(tally, steps, log, bool(small_disk), seconds, alone)
    bars = [
        Bar(
            "tensors that differ from the uninterrupted run",
            len(different),
            at_most=0,
            reason=f"of {len(theirs)}, bitwise",
        ),
        Bar("samples not trained exactly once per epoch", errors, at_most=0),
        Bar("starts not at the newest whole checkpoint", tally.wrong_starts, at_most=0),
        Bar("pointer ahead of the data", tally.pointer_ahead, at_most=0),
        Bar("stops with another exit code than asked for", tally.wrong_codes, at_most=0),
        Bar(
            "seconds until all ranks were gone",
            tally.slowest_s,
            at_most=60,
            reason="by themselves, none was killed for it",
        ),
        Bar("deaths", tally.deaths, at_least=kills),
        Bar("least kills at a point of a save", min(tally.points[p] for p in POINTS), at_least=kills // 20),
    ]
    return finish(args, rows, ("what", "count"), bars)


if __name__ == "__main__":
    sys.exit(main())
