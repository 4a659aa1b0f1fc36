"""`tarflow submit`: a run, a sweep and its evaluation, as Slurm jobs."""

import argparse
import sys
from pathlib import Path

from tarflow.cluster.commands.options import add_profile, log, profile_changes
from tarflow.trainer.commands.options import add_start_options, start_arguments

EXAMPLE = """example:
  tarflow submit configs/imagenet64-cond.yaml --run-dir runs/in64 --nodes 4 --tasks-per-node 8 --profile cluster.yaml --evaluate
  tarflow submit configs/demo.yaml --run-dir runs/seeds --array seed=1,2,3 --dry-run

The job saves and requeues itself at its time limit, on preemption and after a failure, and goes on from the newest
checkpoint. What runs is the code and the configuration as they are now: both are copied to RUN/slurm/.
A run has one living job: a second one is refused, or waits with --after-running.
A job's exit codes: 0 finished or cancelled, 75 saved and requeued, 76 no progress, 78 too many restarts, 79 saved
but Slurm did not take it back, 80 another process trains the run. The last line of its log says which.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="configuration file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument(
        "--run-dir",
        "--run",
        dest="run",
        type=Path,
        required=True,
        metavar="DIR",
        help="run directory (of a sweep: the folder that gets one for each value)",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument(
        "--tasks-per-node", type=int, metavar="M", help="processes per node (default: one per GPU, or 1)"
    )
    parser.add_argument(
        "--one-task-per-node", action="store_true", help="one Slurm task per node, which starts the node's processes"
    )
    add_start_options(parser)
    parser.add_argument("--array", metavar="KEY=A,B,C", help="one run for each value, as one job array")
    parser.add_argument("--evaluate", action="store_true", help="submit a worker that evaluates every checkpoint too")
    parser.add_argument(
        "--eval-profile", type=Path, metavar="FILE", help="profile of that worker (default: a share of --profile)"
    )
    parser.add_argument(
        "--after-running", action="store_true", help="let it wait for the end of the run's jobs that are in the queue"
    )
    add_profile(parser)


def run(args: argparse.Namespace) -> int:
    """Submit; print the jobs, or with --dry-run the batch scripts."""
    from tarflow.cluster.errors import ClusterError
    from tarflow.cluster.submission.profile import load_profile
    from tarflow.cluster.submission.submit import Submission, submit

    profile = load_profile(args.profile, profile_changes(args))
    tasks = args.tasks_per_node if args.tasks_per_node is not None else max(profile.gpus, 1)
    for name, value in (("--nodes", args.nodes), ("--tasks-per-node", tasks)):
        if value < 1:
            raise ClusterError(f"{name} must be at least 1, got {value}")
    if profile.gpus and tasks > profile.gpus:
        source = args.profile or "the profile"
        raise ClusterError(
            f"--tasks-per-node {tasks}, but {source} asks for gpus: {profile.gpus} a node, and a GPU takes one process: set "
            f"gpus: {tasks} there, or --tasks-per-node {profile.gpus} (the default)"
        )
    if args.init_from is not None and not args.init_from.exists():
        raise ClusterError(f"--init-from {args.init_from}: there is no such file")
    if args.init_partial and args.init_from is None:
        raise ClusterError("--init-partial needs --init-from: it says how those weights are used")
    if args.eval_profile and not args.evaluate:
        raise ClusterError("--eval-profile has no effect without --evaluate")
    request = Submission(
        config=args.config, run_dir=args.run, profile=profile, nodes=args.nodes, tasks_per_node=tasks,
        one_task_per_node=args.one_task_per_node,
        overrides=list(args.overrides), sweep=args.array, evaluate=args.evaluate,
        eval_profile=load_profile(args.eval_profile).of_evaluation() if args.eval_profile else None,
        after_running=args.after_running, options=start_arguments(args), init_from=args.init_from,
        init_partial=args.init_partial, dry_run=args.dry_run,
        arguments=_words_after("submit"),
    )  # fmt: skip
    log("\n".join(submit(request)))
    return 0


def _words_after(verb: str) -> list[str]:
    """The command line after its verb, to repeat it by hand."""
    return sys.argv[sys.argv.index(verb) + 1 :] if verb in sys.argv else []
