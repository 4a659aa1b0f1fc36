"""`tarflow decode`: images from the latents that `tarflow encode` wrote, with every image's round-trip error."""

import argparse
from pathlib import Path

from tarflow.evaluation.commands.options import FAILED, OK, add_machine, add_model, log, set_up_process
from tarflow.trainer.checkpoint.choice import add_choice

EXAMPLE = """example:
  tarflow decode runs/demo latents --out decoded

Writes DIR/images/00000000.png ..., DIR/decoded.parquet (a row per image: how far it is from the one that was encoded) and
DIR/decoded.json. Any number of processes share the work.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which weights, which latents."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_OR_WEIGHTS",
        help="the weights that encoded: a run directory or a weights file",
    )
    parser.add_argument("latents", type=Path, metavar="LATENTS", help="directory that `tarflow encode` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for images and table")
    parser.add_argument("--format", choices=("parquet", "csv"), default="parquet", help="of the table (parquet)")
    add_choice(parser)
    parser.add_argument("--weights", metavar="SET", help="raw or an average such as ema-0.100")
    add_model(parser)
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at once")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Decode; 1 if an image is not finite."""
    set_up_process(args, batch_size=1)
    from tarflow.evaluation.latents.decode import DecodeRequest, decode_latents

    request = DecodeRequest(
        source=args.source,
        latents=args.latents,
        out=args.out,
        form=args.format,
        step=args.step,
        images=args.images,
        weights=args.weights,
        model=args.model,
        batch_size=args.batch_size,
        device=args.device,
    )
    return FAILED if decode_latents(request, log).nonfinite else OK
