"""`tarflow sample`: images of a run or a weights file, as PNGs with a grid."""

import argparse
from pathlib import Path

from tarflow.evaluation.commands.options import FAILED, GUIDANCE_FORMS, OK, add_machine, add_model, log, set_up_process
from tarflow.trainer.checkpoint.choice import add_choice

EXAMPLE = """example:
  tarflow sample runs/demo --out samples --num 64 --guidance 2.0
  tarflow sample model.safetensors --out samples --num 16 --labels smileys,food,none
  tarflow sample runs/demo --out path --num 9 --interpolate 1 2 --labels 3
  tarflow sample runs/demo --out rows --num 8 --temperature 0.6,0.8,1
  tarflow sample runs/demo --out best --best-of 4

Writes DIR/images/000000.png ..., DIR/grid.png and DIR/settings.json. Sample i depends on the seed and i alone; the same
command adds only what is missing, other settings are refused.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The defaults are those of the run's configuration."""
    parser.add_argument(
        "source", type=Path, metavar="RUN_OR_WEIGHTS", help="run directory, or a weights file (.safetensors, .pth)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the images")
    parser.add_argument("--num", type=int, default=64, metavar="N", help="how many images (default 64)")
    parser.add_argument(
        "--format", choices=("png", "npz"), default="png",
        help="npz: also DIR/samples.npz with all images as arr_0 (uint8, N x H x W x 3), as ADM's evaluator takes them (png)",
    )  # fmt: skip
    add_choice(parser)
    parser.add_argument("--weights", metavar="SET", help="raw or an average such as ema-0.100")
    add_model(parser)
    parser.add_argument(
        "--labels",
        metavar="A,B,...",
        help="classes in turn, by name or number; none = no label (default: all classes in turn)",
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="JSON list of class names in label order, if the source has none"
    )
    _add_sampling(parser)
    parser.add_argument(
        "--temperature",
        metavar="T,...",
        help="scale of the drawn noise (1); several: --num samples at each, as rows of the grid",
    )
    parser.add_argument(
        "--interpolate", nargs=2, metavar=("A", "B"),
        help="--num images on the path between two: each end is a seed, or a picture; one --labels for all of them",
    )  # fmt: skip
    parser.add_argument(
        "--best-of", type=int, default=1, metavar="N", help="of N candidates for each image keep the likeliest (1)"
    )
    parser.add_argument(
        "--noise-std",
        type=float,
        metavar="S",
        help="training noise of a weights file that does not record it; the level t1, of a model that is told the noise",
    )
    parser.add_argument(
        "--method", choices=("sequential", "fixed_point", "auto"),
        help="token by token, by iterating on many tokens, or the fastest as measured on the first batch",
    )  # fmt: skip
    parser.add_argument("--tolerance", type=float, metavar="E", help="how exact a sample must be, in its noise (1e-4)")
    parser.add_argument("--seed", type=int, help="key of the noise")
    parser.add_argument("--param-dtype", choices=("float32", "bfloat16"), help="dtype of the network's matrix products")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at once; does not change them")
    parser.add_argument("--columns", type=int, metavar="N", help="columns of the grid (default: about square)")
    add_machine(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Guidance and denoising."""
    parser.add_argument("--guidance", type=float, metavar="W", help="guidance weight; 0 = none")
    parser.add_argument("--guide", choices=("a", "b", "ab"), help="what is guided: log-scale a, shift b")
    parser.add_argument(
        "--guidance-form",
        choices=GUIDANCE_FORMS,
        help="formula of guidance: the paper's, the closed form, or linear in exp(a)",
    )
    parser.add_argument("--attn-temp", type=float, metavar="T", help="attention temperature of the unguided half")
    parser.add_argument(
        "--annealed", action=argparse.BooleanOptionalAction, help="let the guidance grow over the tokens"
    )
    parser.add_argument("--denoise", type=float, metavar="M", help="multiplier of the denoising step; 0 = none")
    parser.add_argument("--denoise-steps", type=int, metavar="N", help="steps of iterative denoising")
    parser.add_argument(
        "--denoise-stochastic", action=argparse.BooleanOptionalAction, help="iterative denoising with fresh noise"
    )


def run(args: argparse.Namespace) -> int:
    """Draw images; 1 if some are missing because they were not finite."""
    set_up_process(args, num=1, batch_size=1, columns=1, best_of=1)
    from tarflow.evaluation.samples.draw_to_folder import SampleRequest, sample_images
    from tarflow.evaluation.samples.variations.temperatures import parse_temperatures

    temperatures = () if args.temperature is None else parse_temperatures(args.temperature)

    given = {
        "guidance": args.guidance,
        "guide": args.guide,
        "guidance_form": args.guidance_form,
        "attn_temp": args.attn_temp,
        "annealed": args.annealed,
        "denoise": args.denoise,
        "denoise_steps": args.denoise_steps,
        "denoise_stochastic": args.denoise_stochastic,
        "temperature": temperatures[0] if len(temperatures) == 1 else None,
        "noise_std": args.noise_std,
        "method": args.method,
        "tolerance": args.tolerance,
        "seed": args.seed,
        "param_dtype": args.param_dtype,
    }
    request = SampleRequest(
        source=args.source,
        out=args.out,
        num=args.num,
        form=args.format,
        step=args.step,
        images=args.images,
        weights=args.weights,
        model=args.model,
        batch_size=args.batch_size,
        columns=args.columns,
        device=args.device,
        settings={key: value for key, value in given.items() if value is not None},
        labels=args.labels,
        classes=args.classes,
        interpolate=None if args.interpolate is None else tuple(args.interpolate),
        temperatures=temperatures,
        best_of=args.best_of,
    )
    return OK if sample_images(request, log) else FAILED
