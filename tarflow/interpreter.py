"""Starts other interpreters with the same package: data workers, ranks, checks of a node.

They find `tarflow` where this process found it, and no file in the current folder can shadow a module.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

JOB_VARIABLE = "TARFLOW_JOB"  # set for the processes of a Slurm job: the job's id
HOME = Path(__file__).absolute().parent.parent  # not resolved: the rooms are links in a checkout


def module_command(module: str, *arguments: str, unbuffered: bool = False) -> list[str]:
    """`python -m MODULE ARGUMENTS` with the interpreter that runs this; it does not look into the current folder."""
    return [sys.executable, "-P", *(["-u"] if unbuffered else []), "-m", module, *arguments]


def child_environment(**changes: str) -> dict[str, str]:
    """The environment in which `module_command` finds the same code: this process's own, with some variables changed."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(HOME), *_named_paths()]), "PYTHONSAFEPATH": "1"} | changes


def leave_current_folder() -> None:
    """Stop this process, and all that it or a library starts, from importing files of the current folder.

    Folders in PYTHONPATH are intended; an empty entry, as left by `export PYTHONPATH=$PYTHONPATH:/lib`, is not.
    """
    with suppress(OSError):  # the folder was removed
        here = os.getcwd()
        meant = {os.path.abspath(path) for path in _named_paths()} | {str(HOME)}
        if "" in os.environ.get("PYTHONPATH", "").split(os.pathsep) and here not in meant:
            sys.path[:] = [path for path in sys.path if path not in ("", here)]
    os.environ["PYTHONSAFEPATH"] = "1"
    if "PYTHONPATH" in os.environ:
        os.environ["PYTHONPATH"] = os.pathsep.join(_named_paths())


def _named_paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


@contextmanager
def deaf_to_terminals() -> Iterator[None]:
    """Make processes that are started meanwhile ignore Ctrl-C and a closed terminal, from their first instruction on.

    The process that started them gets the signal and ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
