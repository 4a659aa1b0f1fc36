"""Other interpreters with this very package: data workers, ranks, checks of a node.

They find `tarflow` where this process found it, and nothing in the current folder can stand in for a module.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

JOB_VARIABLE = "TARFLOW_JOB"  # in the environment of what a Slurm job starts: the job's id
HOME = Path(__file__).absolute().parent.parent  # not resolved: the rooms are links in a checkout


def module_command(module: str, *arguments: str, unbuffered: bool = False) -> list[str]:
    """`python -m MODULE ARGUMENTS` with the interpreter that runs this."""
    return [sys.executable, *(["-u"] if unbuffered else []), "-m", module, *arguments]


def child_environment(**changes: str) -> dict[str, str]:
    """This process' environment under which `module_command` finds the same code, with some variables changed."""
    paths = [str(HOME), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"} | changes


@contextmanager
def deaf_to_terminals() -> Iterator[None]:
    """Processes that are started meanwhile never hear Ctrl-C or a closed terminal, not even in their first moments: whoever
    started them does, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
