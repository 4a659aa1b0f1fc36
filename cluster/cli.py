"""The verbs `tarflow submit`, `submit-eval`, `status`, `cancel` and `logs`. Nothing heavy is imported before one runs."""

import argparse
import sys
from pathlib import Path
from typing import Any

SUBMIT_EXAMPLE = """example:
  tarflow submit configs/imagenet64-cond.yaml --run runs/in64 --nodes 4 --tasks-per-node 8 --profile cluster.yaml --evaluate
  tarflow submit configs/demo.yaml --run runs/seeds --array seed=1,2,3 --dry-run

The job saves and requeues itself at its time limit, on preemption and after a failure, and goes on from the newest
checkpoint. What runs is the code and the configuration as they are now: both are copied to RUN/slurm/.
A job's exit codes: 0 finished or cancelled, 75 saved and requeued, 76 no progress, 78 too many restarts, 79 saved
but Slurm did not take it back. The last line of its log says which.
"""

EVAL_EXAMPLE = """example:
  tarflow submit-eval runs/in64 --profile cheap.yaml evaluation.num_samples=10000

The worker evaluates every checkpoint once, requeues itself as training does, and ends with the run.
"""

STATUS_EXAMPLE = """example:
  tarflow status runs/in64 runs/seeds --watch
"""

CANCEL_EXAMPLE = """example:
  tarflow cancel runs/in64

The run saves first; `tarflow submit` with the same directory goes on from there.
"""

LOGS_EXAMPLE = """example:
  tarflow logs runs/in64 --rank 3
"""


def build_submit_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tarflow submit`."""
    _describe(parser, SUBMIT_EXAMPLE)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="configuration file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="run directory (a sweep's: one in it each)"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument(
        "--tasks-per-node", type=int, metavar="M", help="processes per node (default: one per GPU, or 1)"
    )
    parser.add_argument(
        "--one-task-per-node", action="store_true", help="one Slurm task per node, which starts the node's processes"
    )
    parser.add_argument("--array", metavar="KEY=A,B,C", help="one run for each value, as one job array")
    parser.add_argument("--evaluate", action="store_true", help="submit a worker that evaluates every checkpoint too")
    parser.add_argument("--eval-profile", type=Path, metavar="FILE", help="profile of that worker (default: --profile)")
    _add_profile(parser)


def run_submit(args: argparse.Namespace) -> int:
    """Submit; print the jobs, or with --dry-run the batch scripts."""
    from tarflow.cluster.errors import ClusterError
    from tarflow.cluster.submission.profile import load_profile
    from tarflow.cluster.submission.submit import Submission, submit

    profile = load_profile(args.profile, _changes(args))
    tasks = args.tasks_per_node if args.tasks_per_node is not None else max(profile.gpus, 1)
    for name, value in (("--nodes", args.nodes), ("--tasks-per-node", tasks)):
        if value < 1:
            raise ClusterError(f"{name} must be at least 1, got {value}")
    if args.eval_profile and not args.evaluate:
        raise ClusterError("--eval-profile has no effect without --evaluate")
    request = Submission(
        config=args.config, run_dir=args.run, profile=profile, nodes=args.nodes, tasks_per_node=tasks,
        one_task_per_node=args.one_task_per_node,
        overrides=list(args.overrides), sweep=args.array, evaluate=args.evaluate,
        eval_profile=load_profile(args.eval_profile) if args.eval_profile else None, dry_run=args.dry_run,
        arguments=_words_after("submit"),
    )  # fmt: skip
    _say("\n".join(submit(request)))
    return 0


def build_submit_eval_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tarflow submit-eval`."""
    _describe(parser, EVAL_EXAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of sampling and evaluation")
    _add_profile(parser)


def run_submit_eval(args: argparse.Namespace) -> int:
    """Submit the evaluation of a run."""
    from tarflow.cluster.submission.profile import load_profile
    from tarflow.cluster.submission.submit import submit_evaluation

    profile = load_profile(args.profile, _changes(args))
    _say("\n".join(submit_evaluation(args.run, profile, args.overrides, args.dry_run)))
    return 0


def build_status_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tarflow status`."""
    _describe(parser, STATUS_EXAMPLE)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="runs or folders of runs (default: runs)")
    parser.add_argument("--watch", action="store_true", help="again and again, until interrupted")
    parser.add_argument("--every", type=float, default=10.0, metavar="S", help="seconds between looks (default 10)")


def run_status(args: argparse.Namespace) -> int:
    """Print the table of runs."""
    from tarflow.cluster.status import show

    return show(args.runs or [Path("runs")], args.every if args.watch else None)


def build_cancel_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tarflow cancel`."""
    _describe(parser, CANCEL_EXAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--wait", type=float, default=300.0, metavar="S", help="seconds it may take to save (default 300)"
    )


def run_cancel(args: argparse.Namespace) -> int:
    """Have a run save and end, and its evaluation end."""
    from tarflow.cluster.cancel import cancel

    return cancel(args.run, args.wait, _say)


def build_logs_parser(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tarflow logs`."""
    _describe(parser, LOGS_EXAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="rank whose output to show (default 0)")
    parser.add_argument("--evaluation", action="store_true", help="the evaluation's, not the training's")


def run_logs(args: argparse.Namespace) -> int:
    """Print what a rank of the newest job has said."""
    from tarflow.cluster.status import log_text

    sys.stdout.write(log_text(args.run, args.rank, "evaluate" if args.evaluation else "train"))
    return 0


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", type=Path, metavar="FILE", help="the cluster's profile (docs/slurm.md)")
    parser.add_argument("--time", metavar="T", help="time limit instead of the profile's: 90, 1:30:00, 2-00:00:00")
    parser.add_argument("--partition", metavar="P", help="partition instead of the profile's")
    parser.add_argument("--dry-run", action="store_true", help="print the batch script; needs no Slurm")


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in ("time", "partition") if (value := getattr(args, name)) is not None}


def _words_after(verb: str) -> list[str]:
    """The command line after its verb, to repeat it by hand."""
    return sys.argv[sys.argv.index(verb) + 1 :] if verb in sys.argv else []


def _describe(parser: argparse.ArgumentParser, example: str) -> None:
    parser.epilog = example
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def _say(text: str) -> None:
    print(text, flush=True)
