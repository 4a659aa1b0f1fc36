"""Options, checks and output shared by the commands of this room."""

import argparse
import os
from pathlib import Path

from tarflow.data_pipeline.images.bounds import MAX_PIXELS, MAX_SIDE
from tarflow.evaluation.errors import EvaluationError
from tarflow.image_size import plain, sides
from tarflow.trainer.checkpoint.choice import add_choice

OK, FAILED = 0, 1
GUIDANCE_FORMS = ("linear", "closed", "sigma")  # as in section `sampling`, which help must not import


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Options of every command that computes; `set_up_process` applies them."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    group.add_argument("--nice", type=int, default=0, metavar="N", help="lower the priority on the CPU by N (0..19)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The option of every command that takes a weights file from elsewhere."""
    parser.add_argument(
        "--model", metavar="PRESET|KEY=VALUE,...",
        help="model of a weights file that does not say it, where its tensors' shapes do not tell; a contradiction is an error",
    )  # fmt: skip


def add_images(parser: argparse.ArgumentParser, out: str) -> None:
    """Weights, real images with their labels, and the folder for results, which `out` describes."""
    parser.add_argument(
        "source", type=Path, metavar="RUN_OR_WEIGHTS", help="run directory, or a weights file (.safetensors, .pth)"
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="data set with an index, or a folder of images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=out)
    parser.add_argument("--format", choices=("parquet", "csv"), default="parquet", help="of the table (parquet)")
    parser.add_argument(
        "--num", type=int, default=0, metavar="N", help="how many images, spread evenly (default 0 = all)"
    )
    add_choice(parser)
    parser.add_argument("--weights", metavar="SET", help="raw or an average such as ema-0.100")
    add_model(parser)
    parser.add_argument(
        "--labels", metavar="LABEL",
        help="data = those of the data set (default), or one for all images: a class by name or number, none = no label",
    )  # fmt: skip


def add_features(parser: argparse.ArgumentParser) -> None:
    """Options for measuring a folder or a data set outside a run."""
    names = (
        "efficientnet_lite0 (default), mobilenet_v2, fid_inception, fid_inception_pytorch, fid_inception_clean, "
        "torchvision_inception, dinov2"
    )
    parser.add_argument("--features", default="efficientnet_lite0", metavar="NAME", help=f"feature network: {names}")
    parser.add_argument(
        "--features-file", type=Path, metavar="FILE", help="weights of a network that no package provides"
    )
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N",
                        help=f"pixels of the largest image that is decoded ({MAX_PIXELS})")  # fmt: skip
    parser.add_argument(
        "--on-error", choices=("strict", "skip"), default="strict", help="damaged images: an error, or skipped"
    )


def set_up_process(args: argparse.Namespace, **lowest: int) -> None:
    """Check options against their `lowest` values, then set priority and threads."""
    for name, low in {"threads": 1, "nice": 0, **lowest}.items():
        value = getattr(args, name)
        if value is not None and min(sides(value)) < low:
            raise EvaluationError(f"--{name.replace('_', '-')} must be at least {low}, got {plain(value)}")
    if (size := getattr(args, "size", None)) is not None and max(sides(size)) > MAX_SIDE:
        raise EvaluationError(f"--size must be at most {MAX_SIDE} pixels, got {plain(size)}")
    if args.nice:
        os.nice(args.nice)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)


def log(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)
