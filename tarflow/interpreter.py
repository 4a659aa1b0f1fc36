"""Other interpreters with this very package: data workers, ranks, checks of a node.

They find `tarflow` where this process found it, and nothing in the current folder can stand in for a module.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

JOB_VARIABLE = "TARFLOW_JOB"  # in the environment of what a Slurm job starts: the job's id
HOME = Path(__file__).absolute().parent.parent  # not resolved: the rooms are links in a checkout


def module_command(module: str, *arguments: str, unbuffered: bool = False) -> list[str]:
    """`python -m MODULE ARGUMENTS` with the interpreter that runs this; it does not look into the current folder."""
    return [sys.executable, "-P", *(["-u"] if unbuffered else []), "-m", module, *arguments]


def child_environment(**changes: str) -> dict[str, str]:
    """This process' environment under which `module_command` finds the same code, with some variables changed."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(HOME), *_named_paths()]), "PYTHONSAFEPATH": "1"} | changes


def leave_current_folder() -> None:
    """Have neither this process nor any that it starts, a library's own ones too, import what lies in the current folder.

    A folder that PYTHONPATH names is meant; an empty entry in it, as of `export PYTHONPATH=$PYTHONPATH:/lib`, is none.
    """
    with suppress(OSError):  # there is none any more
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
    """Processes that are started meanwhile never hear Ctrl-C or a closed terminal, not even in their first moments: whoever
    started them does, and ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
