"""`tarflow sweep-guidance`: find the guidance with the smallest distance."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tarflow.evaluation.commands.options import GUIDANCE_FORMS, OK, add_machine, log, set_up_process
from tarflow.evaluation.errors import EvaluationError
from tarflow.trainer.checkpoint.choice import add_choice

EXAMPLE = """example:
  tarflow sweep-guidance runs/demo --guidance 0,0.5,1,2 --denoise 0.5,1 --start 500 --final 5000

Every setting is scored on --start samples, the better half on more, the last two on --final. Start any number of
processes: they share the work. Rounds and plot are in RUN/sweeps/. The best setting is written to RUN/sampling.json, which
`sample` and `evaluate` use from then on, if it is clearly the best: more than two standard errors ahead of the next one,
and not at an end of the range. --choose best always takes it, --choose none never.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments and options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of sampling and evaluation")
    parser.add_argument(
        "--guidance", default="0,0.5,1,1.5,2,3", metavar="W,W,...", help="weights (default %(default)s)"
    )
    parser.add_argument("--denoise", metavar="M,M,...", help="multipliers (default: the run's)")
    parser.add_argument("--attn-temp", metavar="T,T,...", help="attention temperatures (default: the run's)")
    parser.add_argument("--noise-level", metavar="T,T,...", help="levels t1 of an iterative model (default: the run's)")
    parser.add_argument("--denoise-steps", metavar="N,N,...", help="steps of iterative denoising (default: the run's)")
    parser.add_argument("--guidance-form", metavar="F,F,...", help="of linear, closed, sigma (default: the run's)")
    parser.add_argument(
        "--guide-blocks",
        metavar="B,B+B,...",
        help="guided blocks: all, or numbers joined by +, also from the end: --guide-blocks=all,-1,0+1 (default: the run's)",
    )
    parser.add_argument(
        "--start",
        type=int,
        default=0,
        metavar="N",
        help="samples of the first round (default: 500, or half of --final)",
    )
    parser.add_argument(
        "--final", type=int, default=0, metavar="N", help="samples of the last round (default: the run's)"
    )
    add_choice(parser)
    parser.add_argument(
        "--choose",
        choices=("clear", "best", "none"),
        default="clear",
        help="make the best setting the run's default: if it is clear (default), always, never",
    )
    parser.add_argument(
        "--no-default", dest="choose", action="store_const", const="none", help="the same as --choose none"
    )
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Sweep, print the best setting, make it the run's default if that is clear or requested."""
    guidance = _numbers("--guidance", args.guidance)
    denoise = _numbers("--denoise", args.denoise)
    attn_temp = _numbers("--attn-temp", args.attn_temp)
    levels = _numbers("--noise-level", args.noise_level)
    steps = _counts("--denoise-steps", args.denoise_steps)
    forms = _words("--guidance-form", args.guidance_form, GUIDANCE_FORMS)
    blocks = _blocks("--guide-blocks", args.guide_blocks)
    set_up_process(args)
    from tarflow.evaluation.sweep.candidates import SweepRequest
    from tarflow.evaluation.sweep.guidance import sweep_guidance

    request = SweepRequest(
        run=args.run,
        guidance=guidance,
        denoise=denoise,
        attn_temp=attn_temp,
        noise_level=levels,
        denoise_steps=steps,
        guidance_form=forms,
        guide_blocks=blocks,
        start=args.start,
        final=args.final,
        step=args.step,
        images=args.images,
        choose=args.choose,
        device=args.device,
        overrides=args.overrides,
    )
    sweep_guidance(request, log)
    return OK


def _parts(option: str, text: str | None) -> list[str]:
    """What stands between commas; of an option that was not given, nothing."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if "" in parts:
        raise EvaluationError(f"{option} {text!r} lacks a value before, between or after its commas")
    return parts


def _numbers(option: str, text: str | None) -> list[float]:
    """Text such as `0,0.5,1` -> numbers, each once."""
    parts = _parts(option, text)
    try:
        return list(dict.fromkeys(float(part) for part in parts))
    except ValueError:
        raise EvaluationError(f"{option} {text!r} must be numbers separated by commas, e.g. 0,0.5,1") from None


def _counts(option: str, text: str | None) -> list[int]:
    """Text such as `10,30` -> whole numbers, each once."""
    numbers = _numbers(option, text)
    if bad := [number for number in numbers if not number.is_integer()]:
        raise EvaluationError(f"{option} {bad[0]:g} must be a whole number")
    return [round(number) for number in numbers]


def _words(option: str, text: str | None, known: Sequence[str]) -> list[str]:
    """Text such as `linear,closed` -> known words, each once."""
    words = list(dict.fromkeys(_parts(option, text)))
    if unknown := [word for word in words if word not in known]:
        raise EvaluationError(f"{option} {unknown[0]!r} must be among {', '.join(known)}")
    return words


def _blocks(option: str, text: str | None) -> list[tuple[int, ...]]:
    """Text such as `all,-1,0+1` -> sets of blocks, each once; an empty one is all."""
    parts = _parts(option, text)
    try:
        sets = [() if part == "all" else tuple(int(block) for block in part.split("+")) for part in parts]
    except ValueError:
        raise EvaluationError(
            f"{option} {text!r} must be all or numbers of blocks joined by +, e.g. all,-1,0+1"
        ) from None
    return list(dict.fromkeys(sets))
