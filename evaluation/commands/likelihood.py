"""`tarflow likelihood`: the exact likelihood of every image of a data set or a folder."""

import argparse

from tarflow.evaluation.commands.options import FAILED, OK, add_images, add_machine, log, set_up_process

EXAMPLE = """example:
  tarflow likelihood runs/demo data/mnist5k/val --out runs/demo/likelihoods/val
  tarflow likelihood model.safetensors ~/pictures/cats --out cats --labels none --draws 8 --format csv

Writes DIR/likelihood.parquet (a row per image: log p in nats, bits per dimension, their error over the draws, what the prior
and each block contribute), DIR/likelihood.json (mean, quantiles, settings) and DIR/likelihood.html (histogram, most and
least likely images). `tarflow report RUN` shows what is below RUN/likelihoods. Any number of processes share the work. Images
get the noise that the flow was trained on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which weights, which images, how."""
    add_images(parser, out="directory for the table and the page")
    parser.add_argument("--draws", type=int, default=1, metavar="K", help="draws of the noise per image (1)")
    parser.add_argument("--seed", type=int, help="key of the noise (default: the sampling settings')")
    parser.add_argument(
        "--noise-std",
        type=float,
        metavar="S",
        help="training noise of a weights file that does not record it; the level of a model that is told the noise",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at once")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Measure; 1 if an image has no finite likelihood."""
    set_up_process(args, num=0, batch_size=1, draws=1)
    from tarflow.evaluation.likelihood.measure import LikelihoodRequest, measure_likelihoods

    request = LikelihoodRequest(
        source=args.source,
        data=args.data,
        out=args.out,
        form=args.format,
        num=args.num,
        step=args.step,
        images=args.images,
        weights=args.weights,
        model=args.model,
        labels=args.labels,
        draws=args.draws,
        seed=args.seed,
        batch_size=args.batch_size,
        device=args.device,
        settings={} if args.noise_std is None else {"noise_std": args.noise_std},
    )
    return FAILED if measure_likelihoods(request, log)["nonfinite"] else OK
