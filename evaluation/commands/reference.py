"""`tarflow reference`: compute the reference statistics of a data set."""

import argparse
from pathlib import Path

from tarflow.evaluation.commands.options import OK, add_features, add_machine, log, set_up_process
from tarflow.image_size import size_option

EXAMPLE = """example:
  tarflow reference data/mnist5k/train --size 28 --channels 1
  tarflow reference data/photos/train --size 256 --features fid_inception --features-file inception.pth
  tarflow reference data/photos/train --size 64 --features fid_inception --features-file inception.pth \
      --format adm --with-images 10000 --out VIRTUAL_photos64.npz

Once per data set: by default the file goes beside the shards, where every evaluation of a run on them finds it. Start
any number, on any machines that see the folder: they share the images, and the bits do not depend on how many.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments and options."""
    parser.add_argument("data", metavar="DATA", help="folder of indexed shards")
    parser.add_argument(
        "--size", type=size_option, required=True, metavar="SIZE",
        help="pixels that models of this data see: a whole number, or HEIGHT,WIDTH",
    )  # fmt: skip
    parser.add_argument("--crop", choices=("centre", "adm", "edm"), help="as data.crop (as prepared, else centre)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1 for grey (default 3)")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="use N images, spread evenly (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: beside the shards)")
    parser.add_argument(
        "--format", choices=("tarflow", "pytorch-fid", "adm"), default="tarflow",
        help="of --out: with everything that is known, or mean and covariance alone, for others' programs: as pytorch-fid "
        "stores them, or with those of the spatial features, as ADM's evaluator does (tarflow)",
    )  # fmt: skip
    parser.add_argument(
        "--with-images", type=int, default=0, metavar="N",
        help="with --format adm: N of the images, too (arr_0): ADM's evaluator needs some for precision and recall (0)",
    )  # fmt: skip
    add_features(parser)
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Compute the statistics of one data set."""
    set_up_process(args, size=1, images=0, max_pixels=1, with_images=0)
    from tarflow.evaluation.references.make import ReferenceRequest, make_reference

    request = ReferenceRequest(
        data=args.data,
        size=args.size,
        channels=args.channels,
        images=args.images,
        features=args.features,
        features_file=args.features_file,
        out=args.out,
        form=args.format,
        with_images=args.with_images,
        on_error=args.on_error,
        device=args.device,
        max_pixels=args.max_pixels,
        crop=args.crop,
    )
    make_reference(request, log)
    return OK
