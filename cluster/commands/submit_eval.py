"""`tarflow submit-eval`: the evaluation of a run, as a Slurm job."""

import argparse
from pathlib import Path

from tarflow.cluster.commands.options import add_profile, log, profile_changes

EXAMPLE = """example:
  tarflow submit-eval runs/in64 --profile cheap.yaml evaluation.num_samples=10000

The job takes what `evaluation` in the profile sets, or all of a profile without it.
The worker evaluates every checkpoint once, requeues itself as training does, and ends with the run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of sampling and evaluation")
    add_profile(parser)


def run(args: argparse.Namespace) -> int:
    """Submit the evaluation and print its job."""
    from tarflow.cluster.submission.profile import load_profile
    from tarflow.cluster.submission.submit import submit_evaluation

    changes = profile_changes(args)
    profile = load_profile(args.profile, changes).of_evaluation(changes)
    log("\n".join(submit_evaluation(args.run, profile, args.overrides, args.dry_run)))
    return 0
