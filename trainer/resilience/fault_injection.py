"""A test hook: make this process fail at a named point, e.g. in the middle of a save or a step.

    TARFLOW_FAULT="POINT[@COUNT][/RANK]=ACTION[,...]"     e.g. "save.written@2/1=kill,step@5=hang"

POINT is one of `POINTS`. It fails on the COUNT-th hit (default 1), on rank RANK only (default: on all ranks). ACTION: kill
(SIGKILL), exit (status 3 at once), raise, hang (sleep forever), spin (hang while holding the GIL), term (SIGTERM to itself),
nospace (the error of a full disk), slow:SECONDS (on every hit from COUNT on). Without the variable nothing happens; only
tests set it.
"""

import ctypes
import errno
import os
import signal
import time

VARIABLE = "TARFLOW_FAULT"
POINTS = (
    "join",  # before the process group is joined
    "start",  # the process group is up, nothing is loaded yet
    "step",  # before a step
    "save.begin",  # before anything is written
    "save.staged",  # the state is copied, training may continue
    "save.written",  # all tensors of this rank are written, nothing is committed
    "save.renamed",  # rank 0: the directory has its final name, but no marker
    "save.marked",  # rank 0: committed, but `latest` still names the one before
    "save.pointed",  # rank 0: before retention
)
_hits: dict[str, int] = {}


def fault_point(point: str) -> None:
    """Fail here if the environment asks for it."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    assert point in POINTS, point
    _hits[point] = _hits.get(point, 0) + 1
    for entry in wanted.split(","):
        where, _, action = entry.partition("=")
        where, _, rank = where.partition("/")
        name, _, count = where.partition("@")
        if name != point or (rank and rank != os.environ.get("RANK", "0")):
            continue
        number = int(count or 1)
        if action.startswith("slow:"):
            if _hits[point] >= number:
                time.sleep(float(action.removeprefix("slow:")))
        elif _hits[point] == number:
            _fail(action, point)


def _fail(action: str, point: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "exit":
        os._exit(3)
    elif action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif action == "hang":
        time.sleep(10**6)
    elif action == "spin":
        ctypes.PyDLL(None).sleep(10**6)  # PyDLL keeps the GIL
    elif action == "nospace":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
    elif action == "raise":
        raise RuntimeError(f"fault injected at {point}")
    else:
        raise ValueError(f"{VARIABLE}: unknown action {action!r}")
