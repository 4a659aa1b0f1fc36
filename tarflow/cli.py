"""The front door: one verb per thing a person does. Each hands over to a room at once.

Neither torch nor any room is imported before a verb is chosen: a login node answers at once.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from tarflow import __version__
from tarflow.errors import UserError

# verb: (module, prefix of its build_parser and run functions, what it does)
VERBS = {
    "data": ("tarflow.data_pipeline.cli", "", "prepare, fetch, index and inspect image data sets"),
    "train": ("tarflow.trainer.cli", "", "train a model; the same command resumes"),
    "ema": ("tarflow.trainer.ema.cli", "", "make an average of the weights of any width, after the training"),
    "checkpoint": ("tarflow.trainer.checkpoint.cli", "", "list, verify, export and prune a run's checkpoints"),
    "evaluate": ("tarflow.evaluation.cli", "evaluate", "score a run's checkpoints, once or as they appear"),
    "sample": ("tarflow.evaluation.cli", "sample", "draw images from a run or a weights file"),
    "sweep-guidance": ("tarflow.evaluation.cli", "sweep_guidance", "find the guidance of the smallest distance"),
    "reference": ("tarflow.evaluation.cli", "reference", "make the reference statistics of a data set"),
    "score": ("tarflow.evaluation.cli", "score", "score a folder of images"),
    "report": ("tarflow.evaluation.cli", "report", "write a run's report.html"),
    "submit": ("tarflow.cluster.cli", "submit", "submit a run, a sweep and its evaluation to Slurm"),
    "submit-eval": ("tarflow.cluster.cli", "submit_eval", "submit the evaluation of a run to Slurm"),
    "status": ("tarflow.cluster.cli", "status", "table of runs: Slurm state, progress, scores"),
    "cancel": ("tarflow.cluster.cli", "cancel", "have a submitted run save and end"),
    "logs": ("tarflow.cluster.cli", "logs", "show what a rank of a submitted run printed"),
}

EXAMPLES = """examples:
  tarflow data fetch mnist5k data/mnist5k
  tarflow train configs/demo.yaml --run runs/demo
  tarflow evaluate runs/demo --watch
  tarflow sample runs/demo --out samples --num 64
  tarflow report runs/demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Errors a user can mend are one message, without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((a for a in arguments if not a.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="tarflow",
        description="Train, sample and evaluate TarFlow, a normalizing flow of causal transformers on image patches.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tarflow {__version__}")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, prefix, summary) in VERBS.items():
        child = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        child.formatter_class = argparse.RawDescriptionHelpFormatter
        if name == verb:  # only the chosen verb's room is imported
            getattr(importlib.import_module(module), f"build_{prefix}_parser" if prefix else "build_parser")(child)
    args, rest = parser.parse_known_args(arguments)
    # argparse gives up on `CONFIG --run DIR section.key=value`: overrides may stand anywhere.
    unknown = [a for a in rest if a.startswith("-") or "=" not in a or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides += rest
    module, prefix, _ = VERBS[args.verb]
    run = getattr(importlib.import_module(module), f"run_{prefix}" if prefix else "run")
    try:
        return int(run(args))
    except Exception as error:
        if not isinstance(error, UserError) or os.environ.get("TARFLOW_TRACEBACK"):
            raise
        print(f"tarflow {args.verb}: error: {error}", file=sys.stderr)
        return 2

