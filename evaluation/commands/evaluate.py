"""`tarflow evaluate`: score a run's checkpoints, once or as they appear."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tarflow.evaluation.commands.options import FAILED, OK, add_machine, add_model, log, set_up_process
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.start.processes import Devices, run_workers, words_again
from tarflow.trainer.checkpoint.choice import add_choice

if TYPE_CHECKING:
    from tarflow.evaluation.worker.follow import WorkerOptions

EXAMPLE = """example:
  tarflow evaluate runs/demo --watch --nice 10
  tarflow evaluate runs/demo sampling.guidance=1.5 evaluation.num_samples=1000 --once
  tarflow evaluate model.safetensors --out scores data.train=data/mnist5k/train
  tarflow evaluate runs/demo --workers auto
  tarflow evaluate runs/demo --dry-run --rate 50

Start any number, on any machines that see RUN: they share the samples, and a killed one loses at most one chunk.
Results: RUN/evals/images-NNNNNNNNNNNN/ (result.json and pictures), RUN/evals.jsonl, TensorBoard.
A checkpoint that has a result under the same settings is skipped; other settings get a directory of their own.
Exit codes: 0 all evaluated, 1 some could not be (the text says why), 2 wrong settings.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments and options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, or a weights file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of sampling and evaluation")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for a weights file: where its results go")
    add_model(parser)
    parser.add_argument("--save", choices=("shards", "png", "npz"),
                        help="keep the samples: WebDataset shards; PNGs; shards, and all in samples.npz (arr_0)")  # fmt: skip
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--once", action="store_true", help="evaluate the existing checkpoints, then stop (default)")
    mode.add_argument("--watch", action="store_true", help="follow the run until its last checkpoint is evaluated")
    parser.add_argument("--newest", action="store_true", help="only the newest checkpoint, not those before it")
    add_choice(parser, "all")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="reference statistics to use, checked (.npz)")
    parser.add_argument("--poll", type=float, default=5.0, metavar="S", help="seconds between polls (default 5)")
    parser.add_argument(
        "--wait-for-run", type=float, default=60.0, metavar="S",
        help="with --watch: seconds to wait for the run directory (default 60)",
    )  # fmt: skip
    parser.add_argument(
        "--idle-limit", type=float, default=0.0, metavar="MIN",
        help="with --watch: stop after MIN minutes without a new checkpoint (default: never)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", default="1", metavar="N",
        help="processes on this machine that share the work, each with a device of its own; auto: one on each GPU (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="say what it would compute and how long that takes, and compute nothing"
    )
    parser.add_argument(
        "--rate", type=float, metavar="TFLOPS",
        help="with --dry-run: what one device sustains (default: as measured in earlier results of the run)",
    )  # fmt: skip
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate a run's checkpoints; 1 if one of them could not be."""
    from tarflow.models.formats.folder import is_weights

    is_file = is_weights(args.run)
    _check_options(args, is_file)
    if args.dry_run:
        return _estimate(args, is_file)
    if args.workers != "1":
        devices = Devices.found(args.device)
        if (count := devices.workers(args.workers)) > 1:
            words = words_again(args, without=("workers", "threads"))
            return run_workers(words, count, devices, args.threads, log)
    set_up_process(args)
    from tarflow.evaluation.errors import DeviceFailedError
    from tarflow.evaluation.worker.follow import evaluate, evaluate_file

    options = _options(args)
    try:
        if is_file:
            result = evaluate_file(args.run, args.out, options, log)
            return FAILED if result and result["problem"] else OK
        outcome = evaluate(args.run, args.watch, options, log)
    except DeviceFailedError as error:  # not a wrong setting: another device, or the same one later, can do it
        log(f"error: {error}")
        return FAILED
    for name, reason in outcome.failed.items():
        log(f"not evaluated: {name}: {reason}")
    if not outcome.done and not outcome.failed:
        log("nothing to do: every checkpoint has a result under these settings")
    return FAILED if outcome.failed else OK


def _check_options(args: argparse.Namespace, is_file: bool) -> None:
    """Raise EvaluationError for options that contradict each other, or that RUN has no use for."""
    one = args.step is not None or args.images is not None
    if args.watch and one:
        option = "--images" if args.step is None else "--step"
        raise EvaluationError(f"{option} selects one checkpoint, --watch follows a run: give one of the two")
    if args.model is not None and not is_file:
        raise EvaluationError(
            f"--model {args.model} is for weights files; {args.run} is a run, whose config.yaml says it"
        )
    if is_file and (args.watch or args.newest or one):
        raise EvaluationError(
            f"--watch, --newest, --images and --step select among a run's checkpoints; {args.run} is a weights file"
        )
    if is_file != (args.out is not None):
        raise EvaluationError("--out DIR goes with a weights file (.safetensors), and a weights file needs it")
    if args.rate is not None and (not args.dry_run or not args.rate):
        raise EvaluationError("--rate TFLOPS is above 0, and goes with --dry-run")


def _options(args: argparse.Namespace) -> "WorkerOptions":
    from tarflow.evaluation.worker.follow import WorkerOptions

    return WorkerOptions(
        newest_only=args.newest,
        step=args.step,
        images=args.images,
        poll_s=args.poll,
        wait_for_run_s=args.wait_for_run if args.watch else 0,
        idle_s=args.idle_limit * 60,
        device=args.device,
        reference=args.reference,
        save=args.save or "",
        model=args.model,
        overrides=args.overrides,
    )


def _estimate(args: argparse.Namespace, is_file: bool) -> int:
    """Print what the evaluation would compute; loads no weights of a run."""
    from tarflow.evaluation.start.estimate import Estimate, Rate, measured_rate
    from tarflow.evaluation.worker.follow import file_waiting, waiting

    workers = Devices.found(args.device).workers(args.workers)
    options = _options(args)
    options.device = "cpu"  # nothing is computed, and a login node has no other
    found = file_waiting(args.run, options) if is_file else waiting(args.run, options, log)
    root, model = args.out if is_file else args.run, found[0][0].config.model
    rate = Rate.stated(args.rate) if args.rate is not None else measured_rate(root, model)
    log(Estimate(found, rate, workers).text())
    return OK
