"""The front door: one verb per thing a person does.

A verb is a module in the `commands/` of a room: `EXAMPLE`, `add_arguments(parser)` and `run(args)`, which returns the exit
code. A verb with verbs of its own (`tarflow data prepare`) has `EXAMPLE` and a table `VERBS` like the one below. One with
`OUTLIVES_ITS_READER = True` goes on when its terminal is closed.
Only the chosen verb is imported, and it loads nothing heavy before it runs: `--help` is quick on a login node.

Whatever a user can cause ends here in one line on stderr, without a traceback (TARFLOW_TRACEBACK=1 shows it):

    wrong settings, a wrong path     2
    a full disk, a broken one        1
    nobody reads the output          141, without a word, as the system's own tools end
    Ctrl-C                           130, without a word; SIGTERM and SIGHUP: 143 and 129
"""

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tarflow import __version__
from tarflow.errors import LASTING, UserError, in_words
from tarflow.outputs import Output, ReaderGoneError, guarded_outputs

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
FAILED, USAGE = 1, 2
OF_A_SIGNAL = 128  # exit codes of what a signal ended: this and its number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    try:
        with _orderly_end(), guarded_outputs() as outputs:
            return _main(sys.argv[1:] if argv is None else argv, outputs)
    except KeyboardInterrupt:
        return OF_A_SIGNAL + signal.SIGINT


def _main(argv: Sequence[str], outputs: Sequence[Output]) -> int:
    args: argparse.Namespace | None = None
    try:
        args = parse(argv)
        for note in repeated(getattr(args, "overrides", [])):
            print(f"{args.parser.prog}: note: {note}", file=sys.stderr)
        for output in outputs:
            output.lasting = getattr(args.command, "OUTLIVES_ITS_READER", False)
        code = int(args.command.run(args))
        sys.stdout.flush()
        return code
    except ReaderGoneError:
        return OF_A_SIGNAL + signal.SIGPIPE
    except (UserError, OSError) as error:
        if os.environ.get("TARFLOW_TRACEBACK"):
            raise
        system = isinstance(error, OSError)
        prefix = args.parser.prog if args is not None else "tarflow"
        text = f"{_option_of(error, args)}{in_words(error)}" if system else str(error)
        print(f"{prefix}: error: {text}", file=sys.stderr)
        return FAILED if system and error.errno not in LASTING else USAGE


@contextmanager
def _orderly_end() -> Iterator[None]:
    """While entered, SIGTERM and SIGHUP unwind the stack, so that half-written files are removed; `nohup` stays in force."""

    def stop(number: int, _: Any) -> NoReturn:
        raise SystemExit(OF_A_SIGNAL + number)

    changed = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)
            changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line, with the nearest known word and where to read on."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {message} (see `{self.prog} --help`)\n")


def repeated(overrides: Sequence[str]) -> list[str]:
    """What to say of settings that are given several times with different values: a later one wins, as options do."""
    values: dict[str, list[str]] = {}
    for key, equals, value in (override.partition("=") for override in overrides):
        if equals and value not in values.setdefault(key, [])[-1:]:
            values[key].append(value)
    return [f"{key} is given as {', then '.join(v)}: the last counts" for key, v in values.items() if len(v) > 1]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed command line: `command` is the module to run, `parser` its parser. Exits on --help and wrong usage.

    A `~` that the shell has left, as in `--run-dir=~/runs/a`, is the home directory.
    """
    parser = Parser(
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
        options = [name for action in args.parser._actions for name in action.option_strings]
        near = "".join(_did_you_mean(word.partition("=")[0], options) for word in unknown[:1])
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    if rest:
        args.overrides += rest
    for name, value in vars(args).items():
        setattr(args, name, [_at_home(v) for v in value] if isinstance(value, list) else _at_home(value))
    return args


def _add_verbs(
    parser: argparse.ArgumentParser, verbs: Mapping[str, tuple[str, str]], words: Sequence[str], dest: str
) -> None:
    """Make each verb a sub-command of `parser`; only the one that `words` begins with is imported and gets its options."""
    if words and words[0] not in verbs:
        near = _did_you_mean(words[0], verbs) or f" (there are {', '.join(verbs)})"
        parser.error(f"argument VERB: invalid choice: {words[0]!r}{near}")
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
            continue
        command.add_arguments(child)
        for action in child._actions:
            action.required = action.required and action.nargs != argparse.ZERO_OR_MORE  # none is as good as many
        child.set_defaults(command=command, parser=child)


def _did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _at_home(value: Any) -> Any:
    if isinstance(value, str | Path) and str(value).startswith("~"):
        return type(value)(os.path.expanduser(value))
    return value


def _option_of(error: OSError, args: argparse.Namespace | None) -> str:
    """The option, with its value, that a path of an error was given by; of an error without a path, the output's option."""
    if args is None:
        return ""
    given = [(action, Path(value)) for action in args.parser._actions
             if isinstance(value := getattr(args, action.dest, None), str | Path)]  # fmt: skip
    if isinstance(error.filename, str | os.PathLike):
        path = os.path.abspath(error.filename)
        ranks = [(_nearness(path, os.path.abspath(value)), action, value) for action, value in given]
        best = max(ranks, key=lambda rank: rank[0], default=(0, None, None))
    else:
        outputs = [(action, value) for action, value in given if action.dest in ("out", "run")]
        best = (1, *outputs[0]) if outputs else (0, None, None)
    nearness, action, value = best
    if action is None or not nearness:
        return ""
    name = action.option_strings[0] if action.option_strings else action.metavar
    same = isinstance(error.filename, str | os.PathLike) and Path(error.filename) == value
    return f"{name} " if same else f"{name} {value}: "


def _nearness(path: str, given: str) -> int:
    """How well a path fits one that was given: itself or below it, or a temporary file beside it; 0 = not at all."""
    if path == given or path.startswith(given.rstrip("/") + "/"):
        return 2 * len(given)
    below = os.path.dirname(path) == os.path.dirname(given) or given.startswith(path.rstrip("/") + "/")
    return 1 if below else 0
