"""Rendezvous of the tasks of one start of a job: rank 0 listens and publishes its address in the run directory.

The port is bound before it is published and stays bound, so two jobs on a node never share one. The path of the file contains
the job, its restart count and the random name of its submission: a restart never finds the address of the start before, and
nobody can have planted one.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.hosts import address, check_meeting_point, expand
from tarflow.cluster.job.environment import Place, poll_s
from tarflow.records import Record, load_record, save_record

WAIT_S = 300.0


class MeetingFile(Record):
    """The address of the stores, as published by rank 0."""

    what: ClassVar[str] = "where the tasks of a job meet"
    way_out: ClassVar[str] = "the next start of the job writes another one"

    host: str = Field(pattern=r"^[A-Za-z0-9:.%_-]{1,255}$")
    check_port: int = Field(ge=1, le=65535)
    port: int = Field(ge=1, le=65535)


@dataclass(frozen=True)
class Meeting:
    """The address of the stores: one for the checks before the run, one for the run."""

    host: str
    check_port: int
    port: int
    stores: tuple[Any, ...] = ()  # rank 0 keeps them open

    def variables(self, place: Place, port: int | None = None) -> dict[str, str]:
        """What torchrun would set for this task. The launcher owns the store: no rank opens a second one."""
        return {
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.size),
            "LOCAL_RANK": str(place.local_rank),
            "LOCAL_WORLD_SIZE": str(place.local_size),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(port or self.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }


def meet(
    folder: Path, place: Place, env: Mapping[str, str] = os.environ, wait_s: float = WAIT_S,
    stopped: Callable[[], bool] = lambda: False,
) -> Meeting | None:  # fmt: skip
    """Open the rendezvous (rank 0) or wait for it (other ranks). None if asked to stop while waiting."""
    file = folder / "rendezvous.json"
    if place.rank == 0:
        host = env.get("MASTER_ADDR")
        nodes = expand(env.get("SLURM_JOB_NODELIST") or "localhost")
        if host:
            check_meeting_point(host, nodes)
        else:
            host = address(nodes[0], nodes[1:])
        stores = _store(host, 0), _store(host, int(env.get("MASTER_PORT", "0")))
        meeting = Meeting(host, stores[0].port, stores[1].port, stores)
        save_record(file, MeetingFile(host=host, check_port=meeting.check_port, port=meeting.port), shared=False)
        return meeting
    end = time.monotonic() + wait_s
    while not file.exists():
        if stopped():
            return None
        if time.monotonic() > end:
            raise ClusterError(
                f"rank {place.rank} waited {wait_s:.0f} s for {file}, which rank 0 writes: rank 0 did not start, or the "
                "run directory is not on a file system that all nodes share"
            )
        time.sleep(poll_s(place.size))
    return Meeting(**load_record(file, MeetingFile).model_dump())


def _store(host: str, port: int) -> Any:
    from torch.distributed import TCPStore

    try:
        return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=WAIT_S))
    except RuntimeError as error:
        what = f"MASTER_PORT={port} is in use on this node" if port else f"no port can be opened on {host}"
        raise ClusterError(
            f"{what}; unset MASTER_PORT to have a free one chosen ({str(error).splitlines()[0]})"
        ) from None
