"""Who may end a rank that makes no progress, and in which order: whoever says most about it comes first.

1. the watchdog: the stacks of all threads, and an exit code of its own;
2. its C-level timer, for a rank whose interpreter does not run: the stacks as well;
3. the process groups: NCCL aborts the process, gloo raises an error; neither says what the rank was doing;
4. NCCL's monitor, which aborts a process whose NCCL thread is stuck.

Everything is derived here from `parallel.start_timeout_s` and `parallel.step_timeout_s`.
"""

import datetime
import math
import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tarflow.trainer.config.schema import ParallelConfig
from tarflow.trainer.errors import TrainerError

LOOK_S = 2.0  # at most, between two looks of the watchdog, which are also its heartbeats
LAST_WORDS_S = 10.0  # at most, for the stacks to reach a file; a file system that takes longer goes without
HEARTBEAT, MONITORING = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "TORCH_NCCL_ENABLE_MONITORING"
NO_LIMIT_S = 365 * 86_400.0
_set_here: dict[str, str] = {}  # variables of this process that no user has set


@dataclass(frozen=True)
class PhaseLimits:
    """In seconds since a rank last made progress, but for `collective_s`."""

    idle_s: float  # the setting: the watchdog ends the rank at its first look after that
    words_s: float  # how long it may write the stacks for
    stacks_s: float  # by then the watchdog has written the stacks, and the process is gone
    clock_s: float  # the C-level timer ends it
    collective_s: float  # timeout of a collective, from its own start


@dataclass(frozen=True)
class Limits:
    """Of startup, saves and shutdown; of a step; and what all of them have in common."""

    start: PhaseLimits
    step: PhaseLimits
    look_s: float  # between two looks of the watchdog
    nccl_heartbeat_s: int  # of NCCL's monitor, from the last sign of life of its thread


def limits_of(parallel: ParallelConfig) -> Limits:
    """All limits of a run, in the order above for every legal setting."""
    look = min(LOOK_S, parallel.step_timeout_s / 4, parallel.start_timeout_s / 4)
    start, step = _phase(parallel.start_timeout_s, look), _phase(parallel.step_timeout_s, look)
    return Limits(start, step, look, math.ceil(max(start.collective_s, step.collective_s) + look))


def _phase(idle: float, look: float) -> PhaseLimits:
    # The watchdog counts what it has seen: a hang is older by up to two looks when it is found.
    words = min(LAST_WORDS_S, max(2.0, idle / 4))
    stacks = idle + 2 * look + words
    clock = stacks + 2 * look
    # A collective may be older than the last progress, because the host runs ahead of the device: by a step at most, and a
    # step takes no longer than the limit.
    return PhaseLimits(idle, words, stacks, clock, idle + clock + look)


def monitor_after_us(limits: Limits, parallel: ParallelConfig, env: MutableMapping[str, str] = os.environ) -> None:
    """Have NCCL's monitor wait for longer than the watchdog. Call it before a process group is made.

    Raises TrainerError if the environment wants it earlier: it would abort a process before the stacks are written.
    """
    given = env.get(HEARTBEAT)
    if given is None or given == _set_here.get(HEARTBEAT):
        env[HEARTBEAT] = _set_here[HEARTBEAT] = str(limits.nccl_heartbeat_s)
        return
    if env.get(MONITORING, "1") == "0":
        return
    if not given.isdecimal():
        raise TrainerError(f"{HEARTBEAT}={given!r} is not a whole number of seconds; unset it")
    if int(given) < limits.nccl_heartbeat_s:
        raise TrainerError(
            f"{HEARTBEAT}={given} contradicts parallel.start_timeout_s={parallel.start_timeout_s:g} and "
            f"parallel.step_timeout_s={parallel.step_timeout_s:g}: NCCL would abort a process before the watchdog has written "
            f"where it hangs. Unset it, raise it to {limits.nccl_heartbeat_s} or more, or lower these settings"
        )


def set_timeouts(seconds: float, spare: Any = None) -> None:
    """Set the timeout of collectives in all process groups, each with all of its backends, but not in `spare`."""
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not spare:
                set_timeout(seconds, group)


def set_timeout(seconds: float, group: Any) -> None:
    """Set the timeout of collectives in one process group."""
    c10d: Any = dist.distributed_c10d
    setter = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # its name before torch 2.14
    setter(datetime.timedelta(seconds=seconds), group)
