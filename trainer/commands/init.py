"""`tarflow init`: write a configuration file for a data set."""

import argparse
from pathlib import Path

EXAMPLE = """example:
  tarflow data prepare ~/pictures data/pictures --size 64 --val-fraction 0.1
  tarflow init data/pictures --out pictures.yaml
  tarflow train pictures.yaml --run-dir runs/pictures

DATA is a prepared data set, or the folder that holds its splits train/ and val/. Comments in the file give the reason for each
value; review it before a long run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="folder or address of a data set with an index")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write; it must not exist (default: NAME.yaml, named after DATA)",
    )


def run(args: argparse.Namespace) -> int:
    from tarflow.files import write_text
    from tarflow.trainer.config.files import build_config
    from tarflow.trainer.config.plain_yaml import parse_yaml
    from tarflow.trainer.errors import TrainerError
    from tarflow.trainer.start.check import check_start
    from tarflow.trainer.start.suggest import suggest

    out = args.out or Path(f"{_name(args.data)}.yaml")
    if out.exists():
        raise TrainerError(f"--out {out} already exists: choose another name")
    text = suggest(args.data)
    config = build_config(parse_yaml(text, str(out)), str(out), [])
    start = check_start(config, Path("runs") / out.stem, 1)
    write_text(out, text)
    print("\n".join(start.lines()))
    print(f"wrote {out}; next: tarflow train {out} --run-dir runs/{out.stem}")
    return 0


def _name(data: str) -> str:
    """`pictures` of data/pictures, data/pictures/train and http://host/pictures/."""
    parts = [part for part in data.split("/") if part not in ("", ".", "..")]
    if len(parts) > 1 and parts[-1] == "train":
        parts.pop()
    return parts[-1].partition(":")[0] if parts else "data"
