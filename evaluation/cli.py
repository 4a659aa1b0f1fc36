"""The verbs that evaluate, sample, sweep, make reference statistics, score folders and report.

Nothing heavy is imported before one runs.
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

from tarflow.evaluation.errors import EvaluationError

OK, FAILED = 0, 1

EVALUATE_EXAMPLE = """example:
  tarflow evaluate runs/demo --watch --nice 10
  tarflow evaluate runs/demo sampling.guidance=1.5 evaluation.num_samples=1000 --once
  tarflow evaluate model.safetensors --out scores data.train=data/mnist5k/train train.noise_std=0.1

Start as many as you like, on any machines that see RUN: they share the samples, and a killed one loses a chunk at most.
Results: RUN/evals/step-NNNNNNNN/ (result.json and pictures), RUN/evals.jsonl, TensorBoard.
A checkpoint that has a result under the same settings is left alone; other settings get a directory of their own.
Exit codes: 0 all evaluated, 1 some could not be (the text says why), 2 wrong settings.
"""

SAMPLE_EXAMPLE = """example:
  tarflow sample runs/demo --out samples --num 64 --guidance 2.0
  tarflow sample model.safetensors --out samples --num 16 --labels 3,7 --noise-std 0.1

Writes DIR/images/000000.png ..., DIR/grid.png and DIR/settings.json. Sample i depends on the seed and i alone; the same
command adds only what is missing, other settings are refused.
"""

SWEEP_EXAMPLE = """example:
  tarflow sweep-guidance runs/demo --guidance 0,0.5,1,2 --denoise 0.5,1 --start 500 --final 5000

Every setting is scored on --start samples, the better half on more, the last two on --final. Start as many processes as
you like: they share the work. The choice is written to RUN/sampling.json, which `sample` and `evaluate` go by from then on;
rounds and plot lie in RUN/sweeps/.
"""

REFERENCE_EXAMPLE = """example:
  tarflow reference data/mnist5k/train --size 28 --channels 1
  tarflow reference data/photos/train --size 256 --features fid_inception --features-file inception.pth

Once per data set: by itself the file goes beside the shards, where every evaluation of a run on them looks for it. Start
as many as you like, on any machines that see the folder: they share the images, and the bits do not depend on how many.
"""

SCORE_EXAMPLE = """example:
  tarflow score samples/images --reference data/mnist5k/train/reference-efficientnet_lite0-0123456789ab.npz
  tarflow score samples/images --against other/images --size 64 --out scores.json

Every image of the folder and its subfolders counts once, at the size of the reference (largest centred square). Broken
files are an error, or are listed with --on-error skip; files that are no images are listed.
"""

REPORT_EXAMPLE = """example:
  tarflow report runs/demo

Writes one page that needs nothing but itself: RUN/report.html.
"""


def build_evaluate_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tarflow evaluate`."""
    _describe(parser, EVALUATE_EXAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, or a weights file (.safetensors)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of sampling and evaluation")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of a weights file: where its results go")
    parser.add_argument("--save", choices=("shards", "png"), help="keep the samples: WebDataset shards, or PNGs")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--once", action="store_true", help="evaluate the checkpoints there are, then stop (default)")
    mode.add_argument("--watch", action="store_true", help="follow the run until its last checkpoint is evaluated")
    parser.add_argument("--newest", action="store_true", help="only the newest checkpoint, not those before it")
    parser.add_argument("--step", type=int, metavar="N", help="only the checkpoint of this step")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="reference statistics to use, checked (.npz)")
    parser.add_argument("--poll", type=float, default=5.0, metavar="S", help="seconds between looks (default 5)")
    parser.add_argument(
        "--wait-for-run",
        type=float,
        default=60.0,
        metavar="S",
        help="with --watch: seconds that the run may take to appear (default 60)",
    )
    parser.add_argument(
        "--idle-limit",
        type=float,
        default=0.0,
        metavar="MIN",
        help="with --watch: stop after so many minutes without a checkpoint (default: never)",
    )
    _add_machine(parser)


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate a run's checkpoints; 1 if one of them could not be."""
    if args.watch and args.step is not None:
        raise EvaluationError("--step is one checkpoint, --watch follows a run: give one of them")
    is_file = args.run.suffix in (".safetensors", ".pth")
    if is_file and (args.watch or args.newest or args.step is not None):
        raise EvaluationError(
            f"--watch, --newest and --step choose among a run's checkpoints; {args.run} is a weights file"
        )
    if is_file != (args.out is not None):
        raise EvaluationError("--out DIR goes with a weights file (.safetensors), and a weights file needs it")
    _prepare(args)
    from tarflow.evaluation.worker.follow import WorkerOptions, evaluate, evaluate_file

    options = WorkerOptions(
        newest_only=args.newest,
        step=args.step,
        poll_s=args.poll,
        wait_for_run_s=args.wait_for_run if args.watch else 0,
        idle_s=args.idle_limit * 60,
        device=args.device,
        reference=args.reference,
        save=args.save or "",
        overrides=args.overrides,
    )
    if is_file:
        result = evaluate_file(args.run, args.out, options, _say)
        return FAILED if result and result["problem"] else OK
    outcome = evaluate(args.run, args.watch, options, _say)
    for name, reason in outcome.failed.items():
        _say(f"not scored: {name}: {reason}")
    if not outcome.done and not outcome.failed:
        _say("nothing to do: every checkpoint has a result under these settings")
    return FAILED if outcome.failed else OK


def build_sample_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tarflow sample`. What is not given is taken from the run's configuration."""
    _describe(parser, SAMPLE_EXAMPLE)
    parser.add_argument("source", type=Path, metavar="RUN_OR_WEIGHTS", help="run directory or .safetensors file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the images")
    parser.add_argument("--num", type=int, default=64, metavar="N", help="how many images (default 64)")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step (default: the newest)")
    parser.add_argument("--weights", metavar="SET", help="raw or an average such as ema-0.100")
    parser.add_argument(
        "--labels", metavar="0,1,2", help="classes in turn; none = no label (default: all classes in turn)"
    )
    parser.add_argument("--guidance", type=float, metavar="W", help="guidance weight; 0 = none")
    parser.add_argument("--guide", choices=("a", "b", "ab"), help="what is guided: log-scale a, shift b")
    parser.add_argument("--attn-temp", type=float, metavar="T", help="attention temperature of the unguided half")
    parser.add_argument(
        "--annealed", action=argparse.BooleanOptionalAction, help="let the guidance grow over the tokens"
    )
    parser.add_argument("--denoise", type=float, metavar="M", help="multiplier of the denoising step; 0 = none")
    parser.add_argument("--noise-std", type=float, metavar="S", help="training noise of a weights file, for denoising")
    parser.add_argument("--seed", type=int, help="key of the noise")
    parser.add_argument("--param-dtype", choices=("float32", "bfloat16"), help="dtype of the network's products")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at once; does not change them")
    parser.add_argument("--columns", type=int, metavar="N", help="columns of the grid (default: about square)")
    _add_machine(parser)


def run_sample(args: argparse.Namespace) -> int:
    """Draw images; 1 if some came out not finite and are missing."""
    _prepare(args)
    from tarflow.evaluation.commands.draw_samples import SampleRequest, sample_images

    given = {
        "guidance": args.guidance,
        "guide": args.guide,
        "attn_temp": args.attn_temp,
        "annealed": args.annealed,
        "denoise": args.denoise,
        "noise_std": args.noise_std,
        "seed": args.seed,
        "param_dtype": args.param_dtype,
        "labels": _labels(args.labels),
    }
    request = SampleRequest(
        source=args.source,
        out=args.out,
        num=args.num,
        step=args.step,
        weights=args.weights,
        batch_size=args.batch_size,
        columns=args.columns,
        device=args.device,
        settings={key: value for key, value in given.items() if value is not None},
    )
    return OK if sample_images(request, _say) else FAILED


def build_sweep_guidance_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tarflow sweep-guidance`."""
    _describe(parser, SWEEP_EXAMPLE)
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
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step (default: the newest)")
    parser.add_argument("--no-default", action="store_true", help="leave the run's default as it is")
    _add_machine(parser)


def run_sweep_guidance(args: argparse.Namespace) -> int:
    """Sweep, say what is best, make it the run's default."""
    numbers = {name: _numbers(f"--{name}", getattr(args, name.replace("-", "_"))) for name in SWEPT}
    _prepare(args)
    from tarflow.evaluation.worker.sweep import SweepRequest, sweep_guidance

    request = SweepRequest(
        run=args.run,
        guidance=numbers["guidance"],
        denoise=numbers["denoise"],
        attn_temp=numbers["attn-temp"],
        start=args.start,
        final=args.final,
        step=args.step,
        set_default=not args.no_default,
        device=args.device,
        overrides=args.overrides,
    )
    sweep_guidance(request, _say)
    return OK


SWEPT = ("guidance", "denoise", "attn-temp")


def _numbers(option: str, text: str | None) -> list[float]:
    """Text such as `0,0.5,1` -> numbers, each once."""
    try:
        return list(dict.fromkeys(float(part) for part in (text or "").split(",") if part.strip()))
    except ValueError:
        raise EvaluationError(f"{option} {text!r} must be numbers with commas between, e.g. 0,0.5,1") from None


def build_reference_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tarflow reference`."""
    _describe(parser, REFERENCE_EXAMPLE)
    parser.add_argument("data", metavar="DATA", help="folder of indexed shards")
    parser.add_argument("--size", type=int, required=True, metavar="N", help="pixels that models of this data see")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1 for grey (default 3)")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="so many, spread evenly (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: beside the shards)")
    _add_features(parser)
    _add_machine(parser)


def run_reference(args: argparse.Namespace) -> int:
    """Make reference statistics."""
    _prepare(args)
    from tarflow.evaluation.commands.score_folder import ReferenceRequest, make_reference

    make_reference(
        ReferenceRequest(
            args.data, args.size, args.channels, args.images, args.features, args.features_file, args.out,
            args.on_error, args.device,
        ),
        _say,
    )  # fmt: skip
    return OK


def build_score_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tarflow score`."""
    _describe(parser, SCORE_EXAMPLE)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images to score")
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="statistics made by `tarflow reference`, checked"
    )
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="compare with the images of another folder")
    parser.add_argument("--size", type=int, metavar="N", help="pixels (default: the reference's, or the images' own)")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="1 for grey (default: the reference's, or 3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all scores and counts there (JSON)")
    _add_features(parser)
    _add_machine(parser)


def run_score(args: argparse.Namespace) -> int:
    """Score a folder of images."""
    _prepare(args)
    from tarflow.evaluation.commands.score_folder import ScoreRequest, score_folder

    score_folder(
        ScoreRequest(
            args.folder, args.reference, args.against, args.size, args.channels, args.features, args.features_file,
            args.on_error, args.out, args.device,
        ),
        _say,
    )  # fmt: skip
    return OK


def _add_features(parser: argparse.ArgumentParser) -> None:
    names = "efficientnet_lite0 (default), mobilenet_v2, fid_inception, torchvision_inception, dinov2"
    parser.add_argument("--features", default="efficientnet_lite0", metavar="NAME", help=f"feature network: {names}")
    parser.add_argument("--features-file", type=Path, metavar="FILE", help="weights of one that no package brings")
    parser.add_argument(
        "--on-error", choices=("strict", "skip"), default="strict", help="damaged images: an error, or left out"
    )


def build_report_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tarflow report`."""
    _describe(parser, REPORT_EXAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: RUN/report.html)")


def run_report(args: argparse.Namespace) -> int:
    """Write the report and say where it is."""
    from tarflow.evaluation.report.build import write_report

    report = write_report(args.run, args.out)
    # Results under other settings lie in directories with their hash behind the step.
    grids = sorted((args.run / "evals").glob(f"step-{'[0-9]' * 8}/grid.png"))
    if grids:
        _say(f"samples: {grids[-1]}")
    _say(f"report: {report}")
    return OK


def _describe(parser: argparse.ArgumentParser, example: str) -> None:
    parser.epilog = example
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    group.add_argument("--nice", type=int, default=0, metavar="N", help="lower the priority on the CPU by N (0..19)")


def _prepare(args: argparse.Namespace) -> None:
    """Priority, threads, and an orderly end on SIGTERM (temporary directories and pins are removed)."""
    for name, value, low in (
        ("--threads", args.threads, 1),
        ("--nice", args.nice, 0),
        ("--num", getattr(args, "num", None), 1),
        ("--size", getattr(args, "size", None), 1),
        ("--images", getattr(args, "images", None), 0),
        ("--batch-size", getattr(args, "batch_size", None), 1),
        ("--columns", getattr(args, "columns", None), 1),
    ):
        if value is not None and value < low:
            raise EvaluationError(f"{name} must be at least {low}, got {value}")
    if args.nice:
        os.nice(args.nice)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)

    def stop(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, stop)


def _labels(text: str | None) -> tuple[int, ...] | None:
    """Text such as `0,1,none` -> (0, 1, -1)."""
    if text is None:
        return None
    try:
        return tuple(-1 if part.strip().lower() == "none" else int(part) for part in text.split(","))
    except ValueError:
        raise EvaluationError(
            f"--labels {text!r} must be numbers of classes with commas between, e.g. 0,1,2, or none"
        ) from None


def _say(text: str) -> None:
    print(text, flush=True)
