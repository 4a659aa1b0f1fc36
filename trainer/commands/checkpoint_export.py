"""`tarflow checkpoint export`: write one set of weights of a checkpoint to a file."""

import argparse
from pathlib import Path

from tarflow.trainer.checkpoint.choice import add_choice

EXAMPLE = """example:
  tarflow checkpoint export runs/demo --out demo.safetensors --weights ema-0.050
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        required=True,
        help="FILE.safetensors, or FILE.pth in the published layout; both say how the weights were trained",
    )
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="SET",
        help="raw, an average such as ema-0.050, or auto: the widest average, raw without any (default)",
    )
    add_choice(parser, "the one of most images")


def run(args: argparse.Namespace) -> int:
    from tarflow.models.weights import save_weights_file
    from tarflow.trainer.checkpoint.find import find
    from tarflow.trainer.checkpoint.marker import config_of
    from tarflow.trainer.checkpoint.pins import pinned
    from tarflow.trainer.checkpoint.provenance import names_of_checkpoint, provenance_of
    from tarflow.trainer.checkpoint.tensors import load_weights
    from tarflow.trainer.config.chosen_sampling import chosen_sampling
    from tarflow.trainer.errors import TrainerError
    from tarflow.trainer.run_dir import require_run

    require_run(args.run)
    _check_out(args.out)
    checkpoint = find(args.run, args.step, args.images)
    with pinned(checkpoint, owner="export"):
        config = config_of(checkpoint)
        which = args.weights if args.weights != "auto" else config.ema.preferred
        weights = load_weights(checkpoint, which)
    chosen, where = chosen_sampling(args.run)
    try:
        provenance = provenance_of(checkpoint, config, which, chosen, classes=names_of_checkpoint(checkpoint, config))
        save_weights_file(args.out, config.model, weights, provenance)
    except OSError as error:
        raise TrainerError(f"--out {args.out} could not be written: {error.strerror or error}") from None
    numbers = sum(t.numel() for t in weights.values())
    print(f"wrote {args.out}: weights {which} of {checkpoint.name} of {args.run}, {numbers:,} numbers")
    if chosen:
        listed = ", ".join(f"{key}={value}" for key, value in chosen.items())
        print(f"its sampling defaults are the run's with {listed}: chosen by {where}")
    return 0


def _check_out(out: Path) -> None:
    """Refuse a path that cannot be written, before anything is read."""
    from tarflow.trainer.errors import TrainerError

    if out.suffix not in (".safetensors", ".pth"):
        raise TrainerError(f"--out {out} must end in .safetensors, or in .pth for the published layout")
    if out.exists():
        raise TrainerError(f"--out {out} already exists: choose another name")
    if not out.parent.is_dir():
        raise TrainerError(f"--out {out}: directory {out.parent} does not exist")
