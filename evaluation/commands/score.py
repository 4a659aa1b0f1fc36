"""`tarflow score`: measure a folder of images, or a file of an array of them."""

import argparse
from pathlib import Path

from tarflow.evaluation.commands.options import OK, add_features, add_machine, log, set_up_process
from tarflow.image_size import size_option

EXAMPLE = """example:
  tarflow score samples/images --reference data/mnist5k/train/reference-efficientnet_lite0-0123456789ab.npz
  tarflow score samples/images --against other/images --size 64 --out scores.json
  tarflow score samples.npz --reference VIRTUAL_imagenet64_labeled.npz --features fid_inception --features-file FILE

Every image in the folder and its subfolders counts once, at the size of the reference (largest centred box). Damaged
files are an error, or listed with --on-error skip; files that are not images are listed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments and options."""
    parser.add_argument(
        "folder", type=Path, metavar="IMAGES", help="folder of images, or .npz file with arr_0 (uint8, N x H x W x 3)"
    )
    parser.add_argument("--reference", type=Path, metavar="FILE", help="statistics from `tarflow reference`, checked")
    parser.add_argument(
        "--against", type=Path, metavar="IMAGES", help="compare with the images of another folder or file"
    )
    parser.add_argument(
        "--size", type=size_option, metavar="SIZE",
        help="pixels: a whole number, or HEIGHT,WIDTH (default: the reference's, or the images' own)",
    )  # fmt: skip
    parser.add_argument("--channels", type=int, choices=(1, 3), help="1 for grey (default: the reference's, or 3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all scores and counts there (JSON)")
    add_features(parser)
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Measure the folder and print its metrics."""
    set_up_process(args, size=1, max_pixels=1)
    from tarflow.evaluation.worker.score_folder import ScoreRequest, score_folder

    request = ScoreRequest(
        folder=args.folder,
        reference=args.reference,
        against=args.against,
        size=args.size,
        channels=args.channels,
        features=args.features,
        features_file=args.features_file,
        on_error=args.on_error,
        out=args.out,
        device=args.device,
        max_pixels=args.max_pixels,
    )
    score_folder(request, log)
    return OK
