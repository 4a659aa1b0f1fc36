"""`tarflow checkpoint export`: write one set of weights of a checkpoint to a file."""

import argparse
from pathlib import Path

from tarflow.trainer.checkpoint.choice import add_choice

EXAMPLE = """example:
  tarflow checkpoint export runs/demo --out demo.safetensors --weights ema-0.050
  tarflow checkpoint export runs/demo --out demo-hub/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="FILE.safetensors, FILE.pth in the published layout, or FOLDER/; all say how the weights were trained",
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "pth", "hf"),
        help="hf: a folder with model.safetensors, config.json and the model card README.md (default: by the ending of --out)",
    )
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="SET",
        help="raw, an average such as ema-0.050, or auto: the widest average, raw without any (default)",
    )
    add_choice(parser, "the one of most images")


def run(args: argparse.Namespace) -> int:
    from tarflow.models.weights import save_weights_file, save_weights_folder
    from tarflow.trainer.checkpoint.find import find
    from tarflow.trainer.checkpoint.marker import config_of
    from tarflow.trainer.checkpoint.pins import pinned
    from tarflow.trainer.checkpoint.provenance import names_of_checkpoint, provenance_of
    from tarflow.trainer.checkpoint.tensors import load_weights
    from tarflow.trainer.config.chosen_sampling import chosen_sampling
    from tarflow.trainer.errors import TrainerError
    from tarflow.trainer.run_dir import require_run

    require_run(args.run)
    out, form = Path(args.out), _form(args.out, args.format)
    _check_out(out)
    checkpoint = find(args.run, args.step, args.images)
    with pinned(checkpoint, owner="export"):
        config = config_of(checkpoint)
        which = args.weights if args.weights != "auto" else config.ema.preferred
        weights = load_weights(checkpoint, which)
    chosen, where = chosen_sampling(args.run)
    try:
        provenance = provenance_of(checkpoint, config, which, chosen, classes=names_of_checkpoint(checkpoint, config))
        save = save_weights_folder if form == "hf" else save_weights_file
        save(out, config.model, weights, provenance)
    except OSError as error:
        raise TrainerError(f"--out {out} could not be written: {error.strerror or error}") from None
    numbers = sum(t.numel() for t in weights.values())
    print(f"wrote {out}: weights {which} of {checkpoint.name} of {args.run}, {numbers:,} numbers")
    if chosen:
        listed = ", ".join(f"{key}={value}" for key, value in chosen.items())
        print(f"its sampling defaults are the run's with {listed}: chosen by {where}")
    return 0


def _form(out: str, asked: str | None) -> str:
    """The format by the ending of --out, or as asked. Raises TrainerError for what contradicts, and for another ending."""
    from tarflow.trainer.errors import TrainerError

    by_name = "hf" if out.endswith("/") else {".safetensors": "safetensors", ".pth": "pth"}.get(Path(out).suffix)
    if asked == "hf" and by_name is None:
        by_name = "hf"
    if by_name is None:
        raise TrainerError(
            f"--out {out} must end in .safetensors, or in .pth for the published layout, or in / for a folder (--format hf)"
        )
    if asked not in (None, by_name):
        raise TrainerError(f"--format {asked}, but --out {out} is named as a {by_name}: change one of the two")
    return by_name


def _check_out(out: Path) -> None:
    """Refuse a path that cannot be written, before anything is read."""
    from tarflow.trainer.errors import TrainerError

    if out.exists():
        raise TrainerError(f"--out {out} already exists: choose another name")
    if not out.parent.is_dir():
        raise TrainerError(f"--out {out}: directory {out.parent} does not exist")
