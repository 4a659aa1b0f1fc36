"""The verb `tarflow checkpoint`: look at a run's checkpoints, check their bytes, take weights out, make room."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from tarflow.trainer.checkpoint.commit import (
    DAMAGED,
    Checkpoint,
    apply_retention,
    checkpoints_dir,
    committed,
    damage,
    find,
    pinned,
    pinned_names,
    remove_set_aside,
    scan,
)
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.files import load_config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.run_dir import load_run_config, require_run, writer_lock

EXAMPLE = """examples:
  tarflow checkpoint list runs/demo
  tarflow checkpoint verify runs/demo
  tarflow checkpoint export runs/demo --out demo.safetensors --weights ema-0.050
  tarflow checkpoint prune runs/demo --keep-latest 3

Exit codes: 0 all well, 1 `verify` found damage, 2 wrong settings.
"""
OK, DAMAGE = 0, 1


def build_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tarflow checkpoint`."""
    parser.epilog = EXAMPLE
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, what: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        child = actions.add_parser(name, help=what, description=what.capitalize() + ".")
        child.add_argument("run", type=Path, metavar="RUN", help="run directory")
        child.set_defaults(do=run)
        return child

    action("list", "table of a run's checkpoints, and of what is there but not used", show)
    verify_ = action("verify", "read every byte and compare sizes and checksums with those of the commit", verify)
    verify_.add_argument("--step", type=int, metavar="N", help="only the checkpoint of this step (default: all)")
    export_ = action("export", "write a weights file", export)
    export_.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        required=True,
        help="FILE.safetensors, with the model's configuration inside, or FILE.pth, the published layout",
    )
    export_.add_argument(
        "--weights",
        default="auto",
        metavar="SET",
        help="raw, an average such as ema-0.050, or auto: the widest average, raw without any (default)",
    )
    export_.add_argument("--step", type=int, metavar="N", help="checkpoint of this step (default: the newest)")
    prune_ = action("prune", "remove checkpoints that the retention settings do not keep", prune)
    prune_.add_argument(
        "--keep-latest",
        type=int,
        metavar="N",
        help="newest ones that stay, 2 at least (default: the run's checkpoint.keep_latest)",
    )
    prune_.add_argument(
        "--keep-every-images",
        type=int,
        metavar="N",
        help="multiples that stay for ever, 0 = none (default: the run's checkpoint.keep_every_images)",
    )
    prune_.add_argument("--damaged", action="store_true", help="remove damaged ones that a start has set aside, too")


def run(args: argparse.Namespace) -> int:
    require_run(args.run)
    return int(args.do(args))


def show(args: argparse.Namespace) -> int:
    usable, refused = scan(args.run)
    config, pins = load_run_config(args.run), pinned_names(args.run)
    print("step        images seen        MB  saved                notes")
    for number, checkpoint in enumerate(usable, 1):
        every = config.checkpoint.keep_every_images
        notes = ["newest"] * (number == len(usable)) + ["pinned"] * (checkpoint.name in pins)
        notes += ["kept for ever"] * bool(every and checkpoint.images_seen % every == 0)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((checkpoint.path / "COMMITTED").stat().st_mtime))
        print(f"{checkpoint.step:<10d}  {checkpoint.images_seen:>11,}  {_bytes(checkpoint) / 1e6:>8,.1f}  {when}  "
              + ", ".join(notes))  # fmt: skip
    for path, reason in sorted(refused.items()):
        print(f"{path.name}: not used: {reason}")
    for path in sorted(checkpoints_dir(args.run).glob(f"step-*{DAMAGED}")):
        print(f"{path.name}: set aside as damaged; `tarflow checkpoint prune --damaged` removes it")
    if not usable:
        print("no committed checkpoint")
    return OK


def verify(args: argparse.Namespace) -> int:
    """Exit code 1 if a committed checkpoint is not what was committed."""
    usable, refused = scan(args.run)
    if args.step is not None:
        usable, refused = [find(args.run, args.step)], {}
    bad = 0
    for checkpoint in usable:
        with pinned(checkpoint, owner="verify"):  # retention of a run under way must not take it from under us
            problem = damage(checkpoint)
        bad += problem is not None
        print(f"{checkpoint.name}: " + (f"DAMAGED: {problem}" if problem else
              f"sound: {len(checkpoint.info['files'])} files, {_bytes(checkpoint):,} bytes"), flush=True)  # fmt: skip
    for path, reason in sorted(refused.items()):
        was_committed = (path / "COMMITTED").exists() and "another run" not in reason
        bad += was_committed
        print(f"{path.name}: {'DAMAGED' if was_committed else 'not used'}: {reason}")
    if not usable and not refused:
        print("no committed checkpoint")
    return DAMAGE if bad else OK


def export(args: argparse.Namespace) -> int:
    if args.out.suffix not in (".safetensors", ".pth"):
        raise TrainerError(f"--out {args.out}: give a name that ends in .safetensors or .pth (published layout)")
    if args.out.exists():
        raise TrainerError(f"--out {args.out} exists; remove it or give another name")
    if not args.out.parent.is_dir():
        raise TrainerError(f"--out {args.out}: there is no directory {args.out.parent}")
    checkpoint = find(args.run, args.step)
    with pinned(checkpoint, owner="export"):
        problem = damage(checkpoint)
        if problem:
            raise TrainerError(
                f"checkpoint {checkpoint.path} is damaged: {problem}; choose another with --step (see `tarflow checkpoint "
                "verify`)"
            )
        config = load_config(checkpoint.path / "config.yaml")
        which = args.weights if args.weights != "auto" else config.ema.preferred
        weights = load_weights(checkpoint, which)
    from tarflow.models.weights import save_weights_file

    try:
        save_weights_file(args.out, config.model, weights)
    except OSError as error:
        raise TrainerError(f"--out {args.out} could not be written: {error.strerror or error}") from None
    numbers = sum(t.numel() for t in weights.values())
    print(f"wrote {args.out}: weights {which} of {checkpoint.name} of {args.run}, {numbers:,} numbers")
    return OK


def prune(args: argparse.Namespace) -> int:
    settings = load_run_config(args.run).checkpoint
    latest = settings.keep_latest if args.keep_latest is None else args.keep_latest
    every = settings.keep_every_images if args.keep_every_images is None else args.keep_every_images
    if latest != -1 and latest < 2:
        raise TrainerError(f"--keep-latest {latest}: 2 at least, or -1 to keep all")
    if every < 0:
        raise TrainerError(f"--keep-every-images {every}: 0 at least (0 keeps none for ever)")
    with writer_lock(args.run):  # a run under way applies its own retention
        kept = committed(args.run)[-latest:] if latest != -1 else []
        if kept and all(damage(c) for c in kept):  # what is removed could be the last that is whole
            raise TrainerError(
                f"the newest {len(kept)} checkpoints of {args.run} are all damaged, nothing is removed; see `tarflow "
                "checkpoint verify`, or keep more with --keep-latest"
            )
        removed = apply_retention(args.run, latest, every)
        removed += remove_set_aside(args.run) if args.damaged else []
    for name in removed:
        print(f"removed {name}")
    print(f"{len(removed)} removed, {len(committed(args.run))} stay")
    return OK


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(int(facts["size"]) for facts in checkpoint.info["files"].values())
