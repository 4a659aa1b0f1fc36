"""`tarflow sweep-guidance`: find the guidance of the smallest distance."""

import argparse
from pathlib import Path

from tarflow.evaluation.commands.options import OK, add_machine, say, set_up_process
from tarflow.evaluation.errors import EvaluationError
from tarflow.trainer.checkpoint.choice import add_choice

EXAMPLE = """example:
  tarflow sweep-guidance runs/demo --guidance 0,0.5,1,2 --denoise 0.5,1 --start 500 --final 5000

Every setting is scored on --start samples, the better half on more, the last two on --final. Start as many processes as
you like: they share the work. Rounds and plot lie in RUN/sweeps/. The best setting is written to RUN/sampling.json, which
`sample` and `evaluate` go by from then on, if it is clearly the best: more than two standard errors ahead of the next one,
and not at an end of the range. --choose best takes it in any case, --choose none in no case.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of sampling and evaluation")
    parser.add_argument(
        "--guidance", default="0,0.5,1,1.5,2,3", metavar="W,W,...", help="weights (default %(default)s)"
    )
    parser.add_argument("--denoise", metavar="M,M,...", help="multipliers (default: the run's)")
    parser.add_argument("--attn-temp", metavar="T,T,...", help="attention temperatures (default: the run's)")
    parser.add_argument("--start", type=int, default=500, metavar="N", help="samples of the first round (default 500)")
    parser.add_argument(
        "--final", type=int, default=0, metavar="N", help="samples of the last round (default: the run's)"
    )
    add_choice(parser)
    parser.add_argument(
        "--choose",
        choices=("clear", "best", "none"),
        default="clear",
        help="make the best setting the run's default: if it is clear (default), in any case, never",
    )
    parser.add_argument(
        "--no-default", dest="choose", action="store_const", const="none", help="the same as --choose none"
    )
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Sweep, print the best setting, make it the run's default if that is clear or asked for."""
    guidance = _numbers("--guidance", args.guidance)
    denoise = _numbers("--denoise", args.denoise)
    attn_temp = _numbers("--attn-temp", args.attn_temp)
    set_up_process(args)
    from tarflow.evaluation.worker.sweep import SweepRequest, sweep_guidance

    request = SweepRequest(
        run=args.run,
        guidance=guidance,
        denoise=denoise,
        attn_temp=attn_temp,
        start=args.start,
        final=args.final,
        step=args.step,
        images=args.images,
        choose=args.choose,
        device=args.device,
        overrides=args.overrides,
    )
    sweep_guidance(request, say)
    return OK


def _numbers(option: str, text: str | None) -> list[float]:
    """Text such as `0,0.5,1` -> numbers, each once."""
    try:
        return list(dict.fromkeys(float(part) for part in (text or "").split(",") if part.strip()))
    except ValueError:
        raise EvaluationError(f"{option} {text!r} must be numbers with commas between, e.g. 0,0.5,1") from None
