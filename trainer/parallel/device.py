"""The device of a rank: the one that was asked for, or an error that names what asked for it and what is there."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from tarflow.devices import VISIBLE, asked_for_gpus, device_index, driver_version, why_no_gpu
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.parallel.world import gather

_MOST_NAMED = 8  # hosts or ranks in a message


def pick_device(name: str, local_rank: int = 0, env: Mapping[str, str] = os.environ) -> torch.device:
    """The device that `train.device` asks for. Of several GPUs it is made this thread's current one.

    `auto` takes the CPU only where nothing asks for a GPU. Raises TrainerError if the device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name in ("auto", "cuda") and not available["cuda"]:
        asked = asked_for_gpus(env) or ("train.device=cuda" if name == "cuda" else "")
        if asked:
            raise TrainerError(
                f"{asked}, but on node {os.uname().nodename} {why_no_gpu()}. Install a torch that this driver supports, or "
                "leave the node out; to train on the CPU all the same, set train.device=cpu"
            )
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise TrainerError(f"train.device={name}: this machine has none; use auto or cpu")
    if name != "cuda":
        return torch.device(name)
    try:
        device = torch.device("cuda", device_index(local_rank, torch.cuda.device_count(), env))
    except ValueError as error:
        raise TrainerError(str(error)) from None
    torch.cuda.set_device(device)
    if device.index != local_rank and "LOCAL_RANK" in os.environ:
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the number of the device
    return device


def idle_gpu(device: torch.device, name: str, env: Mapping[str, str] = os.environ) -> str:
    """A note if `train.device=auto` left a machine's GPU alone without anything having asked for it; else empty."""
    driver = driver_version()
    if device.type != "cpu" or name != "auto" or driver is None or env.get(VISIBLE) is not None:
        return ""
    return f"note: training on the CPU, although this machine has a GPU: {why_no_gpu()}"


@dataclass(frozen=True)
class RankDevice:
    """What a rank computes on."""

    host: str
    kind: str  # cuda, mps or cpu
    gpu: str = ""  # name of the model
    uuid: str = ""  # names one GPU, or one part of a divided GPU, in the world
    torch: str = ""

    def text(self) -> str:
        """All of it as one line, to be sent to other ranks."""
        return json.dumps(asdict(self))


def rank_device(device: torch.device, host: str | None = None) -> RankDevice:
    """What this rank computes on."""
    host, version = host or os.uname().nodename, str(torch.__version__)
    if device.type != "cuda":
        return RankDevice(host, device.type, torch=version)
    facts = torch.cuda.get_device_properties(device)
    return RankDevice(host, "cuda", str(facts.name), str(getattr(facts, "uuid", "")), version)


def disagreement(found: Sequence[RankDevice]) -> str:
    """Why these ranks, in order, cannot train together: unlike kinds of devices, or a GPU shared by two; empty if they can."""
    kinds: dict[str, list[int]] = {}
    for rank, one in enumerate(found):
        kinds.setdefault(one.kind, []).append(rank)
    if len(kinds) > 1:
        parts = [f"{kind} on {_ranks(ranks, found)}" for kind, ranks in sorted(kinds.items(), key=lambda k: -len(k[1]))]
        return (
            f"the ranks of this run compute on unlike devices: {'; '.join(parts)}. Leave out the nodes where torch sees no GPU "
            "(their log, or `python -c 'import torch; torch.cuda.init()'` there, says why), or set train.device"
        )
    owner: dict[str, int] = {}
    for rank, one in enumerate(found):
        if one.uuid and (first := owner.setdefault(one.uuid, rank)) != rank:
            return (
                f"ranks {first} and {rank} on node {one.host} share one GPU ({one.uuid}): start as many processes on each node "
                f"as it has GPUs. If it has enough, each task was shown the same one: see {VISIBLE}, --gpus-per-task and "
                "--gpu-bind"
            )
    return ""


def check_devices(device: torch.device) -> None:
    """Refuse ranks that compute on unlike devices or share a GPU, with the same TrainerError on every rank."""
    if problem := disagreement(gather(rank_device(device))):
        raise TrainerError(problem)


def _ranks(ranks: Sequence[int], found: Sequence[RankDevice]) -> str:
    hosts = list(dict.fromkeys(found[rank].host for rank in ranks))
    shown = [", ".join(map(str, some[:_MOST_NAMED])) + " ..." * (len(some) > _MOST_NAMED) for some in (ranks, hosts)]
    return f"rank{'s' * (len(ranks) > 1)} {shown[0]} (node{'s' * (len(hosts) > 1)} {shown[1]})"
