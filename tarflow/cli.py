"""The command line: one verb for each task.

A verb is a module in the `commands/` of a room: `EXAMPLE`, `add_arguments(parser)` and `run(args)`, which returns the exit
code. A verb with verbs of its own (`tarflow data prepare`) has `EXAMPLE` and a table `VERBS` like the one below. One with
`OUTLIVES_ITS_READER = True` keeps running when its terminal is closed.
Only the chosen verb is imported, and it loads nothing heavy before it runs: `--help` is quick on a login node.

User errors end here in one line on stderr, without a traceback (TARFLOW_TRACEBACK=1 shows it):

    wrong settings, a wrong path     2
    a full disk, a broken one        1
    nobody reads the output          141, silently, like the system's own tools
    Ctrl-C                           130, silently; SIGTERM and SIGHUP: 143 and 129
"""

import argparse
import difflib
import importlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tarflow import __version__, terminal
from tarflow.errors import LASTING, UserError, in_words, path_of
from tarflow.interpreter import leave_current_folder
from tarflow.terminal import Output, ReaderGoneError, guarded_outputs

# verb: (module, what it does)
VERBS = {
    "data": ("tarflow.data_pipeline.commands.data", "prepare, fetch, index and inspect image data sets"),
    "init": ("tarflow.trainer.commands.init", "write a configuration that fits a data set"),
    "train": ("tarflow.trainer.commands.train", "train a model; the same command resumes"),
    "ema": ("tarflow.trainer.commands.ema", "make an average of the weights of any width, after the training"),
    "checkpoint": ("tarflow.trainer.commands.checkpoint", "list, verify, export and prune a run's checkpoints"),
    "evaluate": ("tarflow.evaluation.commands.evaluate", "score a run's checkpoints, once or as they appear"),
    "sample": ("tarflow.evaluation.commands.sample", "draw images from a run or a weights file"),
    "likelihood": (
        "tarflow.evaluation.commands.likelihood",
        "measure the exact likelihood of every image of a data set",
    ),
    "encode": ("tarflow.evaluation.commands.encode", "turn images into latents, as shards"),
    "decode": ("tarflow.evaluation.commands.decode", "turn such latents back into images, and measure the round trip"),
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
WRITTEN = ("out", "sheet", "report", "run", "runs")  # options that name what a verb writes, the most likely first
_MONTH_S = 30 * 86_400
# Bounds of numeric options of all verbs, checked before anything is done: option -> smallest and largest value. An option
# that is not listed is a count, from 0 to COUNTED. A verb that does not allow 0 checks that itself.
COUNTED = 10**15
BOUNDS: Mapping[str, tuple[float, float]] = {
    "seed": (-(2**63), 2**63 - 1),
    "keep_latest": (-1, COUNTED),  # -1: all
    "ranks": (0, 1024), "tasks_per_node": (0, 1024), "nodes": (0, 1 << 16), "world_size": (0, 1 << 20), "rank": (0, 1 << 20),
    "max_restarts": (0, 10**6),
    "threads": (0, 4096), "processes": (0, 1024), "nice": (0, 19),
    "every": (0, _MONTH_S), "wait": (0, _MONTH_S), "poll": (0, _MONTH_S), "wait_for_run": (0, _MONTH_S),
    "idle_limit": (0, _MONTH_S / 60),
    "num": (0, 10**8), "start": (0, 10**8), "final": (0, 10**8), "columns": (0, 10_000), "batch_size": (0, 1 << 20),
    "count": (0, 100_000), "tile": (0, 4096), "size": (0, 1 << 20), "max_pixels": (0, 1 << 34), "shard_size": (0, 10**9),
    "best_of": (0, 10_000), "quality": (0, 100), "val_fraction": (0, 1),
    "guidance": (0, 1e4), "attn_temp": (0, 1e4), "denoise": (0, 1e4), "noise_std": (0, 100), "denoise_steps": (0, 10_000),
    "relative_std": (0, 1),
}  # fmt: skip

FAILED, USAGE = 1, 2
OF_A_SIGNAL = 128  # plus the signal's number: exit code of a process that a signal ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    with _orderly_end() as asked, guarded_outputs() as outputs:
        try:
            if argv is None:  # this process is the verb's own
                leave_current_folder()
            return _main(sys.argv[1:] if argv is None else argv, outputs, asked)
        except BaseException:
            if not asked:
                raise
            return OF_A_SIGNAL + asked[0]


def _main(argv: Sequence[str], outputs: Sequence[Output], asked: Sequence[int]) -> int:
    args: argparse.Namespace | None = None
    try:
        args = parse(argv)
        if wrong := out_of_bounds(args.parser, args):
            raise UserError(wrong)
        for note in repeated(getattr(args, "overrides", [])):
            print(terminal.message(f"{args.parser.prog}: note: {note}"), file=sys.stderr)
        for output in outputs:
            output.lasting = getattr(args.command, "OUTLIVES_ITS_READER", False)
        code = int(args.command.run(args))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except ReaderGoneError:
        return OF_A_SIGNAL + signal.SIGPIPE
    except Exception as error:
        if asked:  # some libraries turn a KeyboardInterrupt into an error of their own, which we then find words for
            raise
        return _told(error, args)


def _told(error: Exception, args: argparse.Namespace | None) -> int:
    """Say what a user can cause in one line; its exit code. Raises what is a fault of the program, and all for developers."""
    if os.environ.get("TARFLOW_TRACEBACK"):
        raise error
    if isinstance(error, MemoryError):
        print(f"{_prog(args)}: error: not enough memory on this machine for what was asked", file=sys.stderr)
        return FAILED
    if isinstance(error, UserError | OSError):
        text, lasting = str(error), True
        if isinstance(error, OSError):
            text, lasting = f"{_option_of(error, args)}{in_words(error)}", error.errno in LASTING
        print(terminal.message(f"{_prog(args)}: error: {text}"), file=sys.stderr)
        return USAGE if lasting else FAILED
    raise error


def _prog(args: argparse.Namespace | None) -> str:
    return str(args.parser.prog) if args is not None else "tarflow"


@contextmanager
def _orderly_end() -> Iterator[list[int]]:
    """Make SIGINT, SIGTERM and SIGHUP unwind the stack, so that half-written files are removed.

    Yields the list of signals received. Signals that are ignored (`nohup`) or handled by others stay so.
    """
    asked: list[int] = []

    def stop(number: int, _: Any) -> NoReturn:
        asked.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(OF_A_SIGNAL + number)

    def lost(unraisable: Any) -> None:
        """Send the signal again: its exception was raised, and lost, in a callback of the interpreter (a weak reference's).

        Other exceptions that are lost after a signal are of what it cut short, such as an archive that closes itself when its
        file is closed already; nobody wants to read of them.
        """
        if not asked:
            hook(unraisable)
            return
        if not isinstance(unraisable.exc_value, KeyboardInterrupt | SystemExit):
            return
        main = threading.main_thread().ident or 0
        threading.Timer(0.01, signal.pthread_kill, (main, asked[-1])).start()

    changed, hook = {}, sys.unraisablehook
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if (before := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler):
                changed[number] = before
                signal.signal(number, stop)
    sys.unraisablehook = lost
    try:
        yield asked
    finally:
        sys.unraisablehook = hook
        for number, before in changed.items():
            signal.signal(number, before)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose usage errors are one line that suggests the nearest known word."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with the code for wrong usage."""
        self.exit(USAGE, terminal.message(f"{self.prog}: error: {message} (see `{self.prog} --help`)") + "\n")


def repeated(overrides: Sequence[str]) -> list[str]:
    """Notes on settings that are given several times with different values: the last one wins."""
    values: dict[str, list[str]] = {}
    for key, equals, value in (override.partition("=") for override in overrides):
        if equals and value not in values.setdefault(key, [])[-1:]:
            values[key].append(value)
    return [f"{key} is given as {', then '.join(v)}: the last counts" for key, v in values.items() if len(v) > 1]


def out_of_bounds(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str | None:
    """An error text for the first number among parsed options that is not finite or is outside its bounds."""
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least, most = BOUNDS.get(action.dest, (0, COUNTED))
        name = "/".join(action.option_strings)
        if isinstance(value, float) and not math.isfinite(value):
            return f"argument {name}: {value} is not a finite number"
        if not least <= value <= most:
            return f"argument {name}: {str(value)[:40]} is out of bounds: it may be {least:,} to {most:,}"
    return None


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
    """Make each verb a sub-command of `parser`; only the verb that is first in `words` is imported and gets its options."""
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
            action.required = action.required and action.nargs != argparse.ZERO_OR_MORE  # zero values are fine
        child.set_defaults(command=command, parser=child)


def _did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _at_home(value: Any) -> Any:
    if isinstance(value, str | Path) and str(value).startswith("~"):
        return type(value)(os.path.expanduser(value))
    return value


def _option_of(error: OSError, args: argparse.Namespace | None) -> str:
    """The option, with its value, that named the path of an error. An error without a path is about what is written."""
    given = [
        (action, Path(value))
        for action in (args.parser._actions if args is not None else ())
        for value in _paths(getattr(args, action.dest, None))
    ]
    written = sorted((one for one in given if one[0].dest in WRITTEN), key=lambda one: WRITTEN.index(one[0].dest))
    if not path_of(error) and written:
        error.filename = str(written[0][1])
    path = os.path.abspath(path_of(error))
    within = [one for one in given if _is_within(path, one[1])]
    beside = [one for one in written if _is_within(path, one[1].parent) or _is_within(one[1], path)]
    if not path_of(error) or not within + beside:
        return ""
    action, value = max(within, key=lambda one: len(str(one[1]))) if within else beside[0]
    name = action.option_strings[0] if action.option_strings else action.metavar
    return f"{name} " if path == os.path.abspath(value) else f"{name} {value}: "


def _paths(value: object) -> list[str | Path]:
    """What an option was given that may be a path; of several words only those that must be."""
    if isinstance(value, list):
        return [one for one in value if isinstance(one, Path)]
    return [value] if isinstance(value, str | Path) else []


def _is_within(path: str | Path, folder: str | Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
