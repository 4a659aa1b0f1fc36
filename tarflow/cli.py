"""The front door: one verb per thing a person does.

A verb is a module in the `commands/` of a room: `EXAMPLE`, `add_arguments(parser)` and `run(args)`, which returns the exit
code. A verb with verbs of its own (`tarflow data prepare`) has `EXAMPLE` and a table `VERBS` like the one below.
Only the chosen verb is imported, and it loads nothing heavy before it runs: `--help` is quick on a login node.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence

from tarflow import __version__
from tarflow.errors import UserError

# verb: (module, what it does)
VERBS = {
    "data": ("tarflow.data_pipeline.commands.data", "prepare, fetch, index and inspect image data sets"),
    "init": ("tarflow.trainer.commands.init", "write a configuration that fits a data set"),
    "train": ("tarflow.trainer.commands.train", "train a model; the same command resumes"),
    "ema": ("tarflow.trainer.commands.ema", "make an average of the weights of any width, after the training"),
    "checkpoint": ("tarflow.trainer.commands.checkpoint", "list, verify, export and prune a run's checkpoints"),
    "evaluate": ("tarflow.evaluation.commands.evaluate", "score a run's checkpoints, once or as they appear"),
    "sample": ("tarflow.evaluation.commands.sample", "draw images from a run or a weights file"),
    "sweep-guidance": ("tarflow.evaluation.commands.sweep_guidance", "find the guidance of the smallest distance"),
    "reference": ("tarflow.evaluation.commands.reference", "make the reference statistics of a data set"),
    "score": ("tarflow.evaluation.commands.score", "score a folder of images"),
    "report": ("tarflow.evaluation.commands.report", "write a run's report.html"),
    "submit": ("tarflow.cluster.commands.submit", "submit a run, a sweep and its evaluation to Slurm"),
    "submit-eval": ("tarflow.cluster.commands.submit_eval", "submit the evaluation of a run to Slurm"),
    "status": ("tarflow.cluster.commands.status", "table of runs: Slurm state, progress, scores"),
    "cancel": ("tarflow.cluster.commands.cancel", "have a submitted run save and end"),
    "logs": ("tarflow.cluster.commands.logs", "show what a rank of a submitted run printed"),
}

EXAMPLES = """examples:
  tarflow data fetch mnist5k data/mnist5k
  tarflow train configs/demo.yaml --run-dir runs/demo
  tarflow evaluate runs/demo --watch
  tarflow sample runs/demo --out samples --num 64
  tarflow report runs/demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. A user error is one message, without a traceback."""
    args = parse(sys.argv[1:] if argv is None else argv)
    for note in repeated(getattr(args, "overrides", [])):
        print(f"tarflow {args.verb}: note: {note}", file=sys.stderr)
    try:
        return int(args.command.run(args))
    except UserError as error:
        if os.environ.get("TARFLOW_TRACEBACK"):
            raise
        print(f"tarflow {args.verb}: error: {error}", file=sys.stderr)
        return 2


def repeated(overrides: Sequence[str]) -> list[str]:
    """What to say of settings that are given several times with different values: a later one wins, as options do."""
    values: dict[str, list[str]] = {}
    for key, equals, value in (override.partition("=") for override in overrides):
        if equals and value not in values.setdefault(key, [])[-1:]:
            values[key].append(value)
    return [f"{key} is given as {', then '.join(v)}: the last counts" for key, v in values.items() if len(v) > 1]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed command line; `verb` is its first word, `command` the module to run. Exits on --help and wrong usage."""
    parser = argparse.ArgumentParser(
        prog="tarflow",
        description="Train, sample and evaluate TarFlow, a normalizing flow of causal transformers on image patches.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tarflow {__version__}")
    _add_verbs(parser, VERBS, [word for word in arguments if not word.startswith("-")], dest="verb")
    args, rest = parser.parse_known_args(arguments)
    # argparse gives up on `CONFIG --run-dir DIR section.key=value`: overrides may stand anywhere.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides += rest
    return args


def _add_verbs(
    parser: argparse.ArgumentParser, verbs: Mapping[str, tuple[str, str]], words: Sequence[str], dest: str
) -> None:
    """Make each verb a sub-command of `parser`; only the one that `words` begins with is imported and gets its options."""
    children = parser.add_subparsers(dest=dest, metavar="VERB", required=True)
    for name, (module, summary) in verbs.items():
        child = children.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if words[:1] != [name]:
            continue
        command = importlib.import_module(module)
        child.epilog = command.EXAMPLE
        child.formatter_class = argparse.RawDescriptionHelpFormatter
        if hasattr(command, "VERBS"):
            _add_verbs(child, command.VERBS, words[1:], dest=f"{name}_verb")
        else:
            command.add_arguments(child)
            child.set_defaults(command=command)
