"""Which GPU belongs to this process, and whether anything asked for one: Slurm, the user and torch, held against each other.

Nothing here loads torch, except `why_no_gpu`.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from tarflow.files import read_bytes

# Set for the processes of a Slurm job: GPUs on each node that must do its work. 0: none has to, whatever Slurm hands out.
GPUS_VARIABLE = "TARFLOW_GPUS"
VISIBLE = "CUDA_VISIBLE_DEVICES"
_SLURM = ("SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
_NONE = ("", "-1", "NoDevFiles", "none", "void")  # values of VISIBLE that stand for no GPU; NoDevFiles is Slurm's

T = TypeVar("T")


def visible_devices(env: Mapping[str, str] = os.environ) -> list[str] | None:
    """Entries of CUDA_VISIBLE_DEVICES (indices or UUIDs) up to the first invalid one; None if it is not set."""
    if VISIBLE not in env:
        return None
    found = []
    for entry in (part.strip() for part in env[VISIBLE].split(",")):
        if entry in _NONE:  # CUDA ignores whatever follows
            break
        found.append(entry)
    return found


def asked_for_gpus(env: Mapping[str, str] = os.environ) -> str:
    """What asks for GPUs here, in words: the job, CUDA_VISIBLE_DEVICES, or Slurm; empty if nothing does."""
    if (count := env.get(GPUS_VARIABLE)) is not None:
        return f"the job asked for {_gpus(count)} on each node" if count not in ("", "0") else ""
    visible = visible_devices(env)
    if visible is not None:
        return f"{VISIBLE}={env[VISIBLE]}" if visible else ""
    named = next((name for name in _SLURM if env.get(name, "0") not in ("", "0")), None)
    return f"Slurm gave this job GPUs ({named}={env[named]})" if named else ""


def _gpus(count: str) -> str:
    return "1 GPU" if count == "1" else f"{count} GPUs"


def device_index(local_rank: int, count: int, env: Mapping[str, str] = os.environ) -> int:
    """The GPU of a process that is number `local_rank` on its node and sees `count` GPUs.

    A site that binds one GPU to each task (`--gpus-per-task`, `--gpu-bind`) shows each process that one as GPU 0.

    Raises:
        ValueError: this process has none.

    """
    if local_rank < count:
        return local_rank
    if count == 1:
        return 0
    shown = f" ({VISIBLE}={env[VISIBLE]})" if VISIBLE in env else ""
    raise ValueError(
        f"process {local_rank} of node {os.uname().nodename} (LOCAL_RANK, counted from 0) has no GPU of its own: it sees "
        f"{_gpus(str(count)) if count else 'no GPU'}{shown}. Start as many processes on each node as it has GPUs, or let Slurm "
        "bind one to each task (--gpus-per-task=1)"
    )


def driver_version() -> str | None:
    """Version of this machine's NVIDIA driver; None without one, or where it does not say."""
    with suppress(OSError):
        text = read_bytes(Path("/proc/driver/nvidia/version")).decode(errors="replace")
        if found := re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text):
            return found[1]
    return None


def why_no_gpu() -> str:
    """Why torch sees no GPU here, in words that name the versions of both sides. Loads torch."""
    import torch

    driver = driver_version()
    machine = f"NVIDIA driver {driver}" if driver else "no NVIDIA driver is loaded"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} sees no GPU: it was built without CUDA ({machine})"
    reason = "torch.cuda.is_available() is False"
    try:
        torch.cuda.init()
    except Exception as error:  # noqa: BLE001 -- torch raises several kinds, and the first line says what is wrong
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU: {reason} ({machine})"


def keep_device(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, to be run by another thread: there it finds the GPU that is current in this thread.

    A new thread begins with GPU 0, whatever its process uses: pinning memory or waiting for the device there would open a
    context on GPU 0 for every process of the node.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return function
    device = torch.cuda.current_device()

    def on_device(*args: Any, **named: Any) -> T:
        torch.cuda.set_device(device)
        return function(*args, **named)

    return on_device
