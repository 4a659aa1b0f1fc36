"""Train on photographs from Debian's packages: plain TarFlow and the follow-up recipe at equal compute.

    python -m benchmarks.photographs                      # 64, 128, 256 and 512 px, --minutes 45 for each arm at 64 px
    python -m benchmarks.photographs --sizes 64 --arms plain --minutes 10 --out /tmp/photographs
    python -m benchmarks.photographs --quick              # two to three minutes

Stop it when you like and run it again: it goes on from the newest checkpoint.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import finish, parse_args
from benchmarks.photographs.arms import ARMS, BATCH, SHARE, SMOKE_STEPS, Arm, reference_images, settings_of
from benchmarks.photographs.scores import bits_of, difference, evaluate
from benchmarks.photographs.sheet import sheet
from benchmarks.photographs.sources import download, photographs
from benchmarks.photographs.tables import HEADER, Result, curve_rows, markdown, result_rows
from benchmarks.photographs.tiles import count_rows, held_out, write_tiles
from benchmarks.photographs.training import STEPS, cost_of_image, images_for, train_in_slices, write_config
from benchmarks.verbs import VerbFailedError, run_verb, stop_on_sigterm
from tarflow.files import write_json

QUICK = 10  # of so many photographs of each kind one is used
QUICK_CPU_S, QUICK_STEPS = 15.0, (1, 5)
CORES = 2  # --minutes counts two cores, however many there are: a budget is so many CPU seconds on any machine


def prepare(root: Path, packages: Path, size: int, quick: bool) -> tuple[list[tuple[Any, ...]], int]:
    """Make ROOT/data/SIZE from the packages; the table of its sources, and the number of classes."""
    photos = photographs(packages)
    held = held_out(photos)
    if quick:
        photos = photos[::QUICK]
        held = held_out(photos)
    counts = write_tiles(photos, size, held, root / f"tiles/{size}")
    data = root / f"data/{size}"
    if not data.is_dir():
        run_verb(["data", "prepare", root / f"tiles/{size}", data, "--size", size], root / "prepare.log")
    return count_rows(counts, photos), len(json.loads((data / "train/classes.json").read_text()))


@dataclass(frozen=True)
class Plan:
    """A run to make: which arm at which size, for how many images, from which configuration."""

    arm: Arm
    size: int
    images: int
    config: Path
    run: Path


def planned(arms: Sequence[Arm], size: int, root: Path, cpu_s: float, classes: int, quick: bool) -> list[Plan]:
    """The runs of a size. What an image costs is measured for all arms one after the other, before any is trained."""
    data = str((root / f"data/{size}").resolve())
    plans = []
    for arm in arms:
        name = f"{arm.name}-{size}"
        images = SMOKE_STEPS * BATCH
        if cpu_s:
            draft = write_config(
                root / f"configs/{name}-cost.yaml", settings_of(arm, size, data, classes, BATCH, quick)
            )
            known, steps = root / f"configs/{name}-cost.json", QUICK_STEPS if quick else STEPS
            images = images_for(cpu_s, cost_of_image(draft, root / "scratch", BATCH, known, steps), BATCH)
        label = f"{name}-{cpu_s:.0f}s"
        config = write_config(root / f"configs/{label}.yaml", settings_of(arm, size, data, classes, images, quick))
        plans.append(Plan(arm, size, images, config, root / "runs" / label))
    return plans


def result_of(plan: Plan, root: Path, slice_s: float, quick: bool) -> Result:
    """Train a planned run to its end and evaluate it; both go on from what is there."""
    taken = train_in_slices(plan.config, plan.run, slice_s)
    reference, log = root / f"reference-{plan.size}.npz", root / "prepare.log"
    if not reference.is_file():
        words = ["reference", root / f"data/{plan.size}/train", "--size", plan.size, "--out", reference]
        run_verb([*words, "--images", reference_images(plan.size, quick)], log)
    scores = evaluate(plan.run, reference)
    num, draws = (64, 1) if quick or not SHARE[plan.size] else (0, 2) if plan.size == 64 else (300, 1)
    bits = bits_of(plan.run, root / f"tiles/{plan.size}/val", root / f"likelihoods/{plan.run.name}", num, draws)
    run_verb(["report", plan.run], log)
    return Result(plan.arm.name, plan.size, plan.images, taken, scores, bits)


def compared(results: Sequence[Result]) -> list[tuple[Any, ...]]:
    """(size, arms, difference of bits, its error, of the distance, its error): each arm against the first of its size."""
    rows: list[tuple[Any, ...]] = []
    for size in dict.fromkeys(result.size for result in results):
        base, *others = [result for result in results if result.size == size]
        rows += [
            (size, f"{other.arm} - {base.arm}", *difference(other.bits, base.bits), *other.distance_from(base))
            for other in others
        ]
    return rows


def arguments() -> Any:
    return parse_args(__doc__.splitlines()[0], [
        ("--minutes", {"type": float, "default": 45.0, "help": "budget of an arm at 64 px, in minutes of two cores (45)"}),
        ("--slice-minutes", {"type": float, "default": 10.0, "help": "training is stopped and resumed after so many (10)"}),
        ("--sizes", {"type": int, "nargs": "+", "choices": list(SHARE), "default": list(SHARE), "help": "(all four)"}),
        ("--arms", {"nargs": "+", "choices": [arm.name for arm in ARMS], "help": "(all)"}),
        ("--out", {"type": Path, "default": Path("runs/photographs"), "help": "where everything goes (runs/photographs)"}),
    ])  # fmt: skip


def main() -> int:
    args = arguments()
    stop_on_sigterm()
    root = args.out / "quick" if args.quick else args.out
    download(args.out / "packages")
    arms = [arm for arm in ARMS if not args.arms or arm.name in args.arms]
    results: list[Result] = []
    for size in [64] if args.quick else args.sizes:
        rows, classes = prepare(root, args.out / "packages", size, args.quick)
        sources = ("package", "kind", "photographs", "train", "held out", "flat")
        print(f"\n{size} px\n{markdown(sources, rows)}\n", flush=True)
        cpu_s = QUICK_CPU_S if args.quick else 60 * CORES * args.minutes * SHARE[size]
        plans = planned(arms, size, root, cpu_s, classes, args.quick)
        for plan in plans:
            results.append(result_of(plan, root, 60 * args.slice_minutes, args.quick))
            write_json(
                root / "figures.json", {"budget_minutes": args.minutes, "results": [r.record() for r in results]}
            )
        if len(plans) > 1:
            run_verb(
                ["report", *(p.run for p in plans), "--out", root / f"comparison-{size}.html"], root / "prepare.log"
            )
    for size in dict.fromkeys(result.size for result in results):
        grids = [Path(r.scores[-1].folder) / "grid.png" for r in results if r.size == size]
        sheet([grid for grid in grids if grid.is_file()], root / f"samples-{size}.png")
    print("\n" + markdown(("size", "arm", "images", "samples", "distance", "+-"), curve_rows(results)))
    if rows := compared(results):
        print("\n" + markdown(("size", "arms", "bits/dim", "+-", "distance", "+-"), rows))
    print("\n" + markdown(HEADER, result_rows(results)) + "\n")
    return finish(args, result_rows(results), HEADER, [], ("torch", "pillow"))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except VerbFailedError as error:
        sys.exit(str(error))
