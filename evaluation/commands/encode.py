"""`tarflow encode`: the latents of a data set or a folder of images, as shards."""

import argparse

from tarflow.evaluation.commands.options import FAILED, OK, add_images, add_machine, log, set_up_process

EXAMPLE = """example:
  tarflow encode runs/demo data/mnist5k/val --out latents
  tarflow encode model.safetensors ~/pictures/cats --out cats --labels none --noisy

Writes DIR/latents-NNNNN-of-NNNNN.npz (z float32 [n, T, D], ids, labels and pixels), DIR/latents.json (all that they depend on)
and DIR/latents.parquet (a row per image). Any number of processes share the work; the same command does what is missing.
`tarflow decode` is the way back.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which weights, which images, how."""
    add_images(parser, out="directory for the latents")
    parser.add_argument(
        "--noisy", action="store_true", help="add the noise of training first: such latents are standard normal"
    )
    parser.add_argument("--seed", type=int, help="with --noisy: key of the noise (default: the sampling settings')")
    parser.add_argument(
        "--noise-std",
        type=float,
        metavar="S",
        help="with --noisy: the noise of a weights file that does not record it; the level of a model that is told the noise",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at once")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Encode; 1 if an image has no finite latent."""
    from tarflow.evaluation.errors import EvaluationError

    if args.seed is not None and not args.noisy:
        raise EvaluationError(
            f"--seed {args.seed} is about noise, and without --noisy none is added: give both or neither"
        )
    set_up_process(args, num=0, batch_size=1)
    from tarflow.evaluation.latents.encode import EncodeRequest, encode_images

    request = EncodeRequest(
        source=args.source,
        data=args.data,
        out=args.out,
        num=args.num,
        form=args.format,
        noisy=args.noisy,
        seed=args.seed,
        step=args.step,
        images=args.images,
        weights=args.weights,
        model=args.model,
        labels=args.labels,
        batch_size=args.batch_size,
        device=args.device,
        settings={} if args.noise_std is None else {"noise_std": args.noise_std},
    )
    return FAILED if encode_images(request, log).nonfinite else OK
