"""The last check before the first step: every rank's device, and one reduction between all nodes over each backend.

Training votes, saves and sends objects over gloo, and gradients over NCCL where there are GPUs. Either may find no way between
two nodes, and then waits for as long as a step or a start may take. Here it has minutes, and who did not answer is named.
"""

import argparse
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from pydantic import Field

from tarflow.cluster.job.preflight import Here
from tarflow.devices import driver_version
from tarflow.errors import UserError, why
from tarflow.records import DamagedFileError, Record, load_record, save_record

DEVICE_FAILED = 90  # this rank's own device is broken: its node is to blame, whatever the others report
FAILED = 1
SPARE_S = 15.0  # after a backend's own timeout, whose error says more than ours
_MOST_NAMED = 8


class Silent(Record):
    """The nodes of ranks that did not answer: silent.json in the folder of a start, by rank 0."""

    what: ClassVar[str] = "nodes that did not answer the check before the first step"

    nodes: tuple[str, ...] = Field(())


def silent_node(folder: Path) -> str:
    """The only node that did not answer, as rank 0 wrote; empty if all did, or if several did not: that may be the network."""
    try:
        nodes = load_record(folder / "silent.json", Silent).nodes
    except (DamagedFileError, OSError):
        return ""
    return nodes[0] if len(nodes) == 1 else ""


class Check:
    """The check of one rank. All go through the same stages in the same order, and leave a mark in the store at each.

    Rank 0 waits for the marks of all and then lets them go on: a thousand ranks that look for each other would keep the store
    busy with that alone. It is also the first to give up, and names who is missing.
    """

    def __init__(self, limit_s: float, folder: Path, ranks_per_task: int, node: str) -> None:
        self.rank, self.size, self.local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        self.limit_s, self.folder, self.ranks_per_task, self.node = limit_s, folder, ranks_per_task, node
        self.spare_s = SPARE_S if self.rank == 0 else 3 * SPARE_S
        self.stage, self.began = "meeting", time.monotonic()
        self.store: Any = None

    @property
    def left_s(self) -> float:
        """Seconds of the limit that are left, for a wait that reports its own failure; not too few for that."""
        return max(self.limit_s - (time.monotonic() - self.began), 5.0)

    def meet(self) -> None:
        """Connect to the meeting point; from then on a timer ends this process where it waits too long."""
        self.began = time.monotonic()
        self.store = self._connect(self.limit_s + self.spare_s)
        timer = threading.Timer(self.limit_s + self.spare_s, lambda: self.fail("no end", another_thread=True))
        timer.daemon = True
        timer.start()

    def _connect(self, limit_s: float) -> Any:
        from torch.distributed import TCPStore

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            return TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=limit_s))
        except RuntimeError as error:
            text = f"rank {self.rank} does not reach the meeting point {host}:{port} within {limit_s:.0f} s"
            leave(FAILED, f"{text}: {_first_line(error)}")

    def enter(self, stage: str, said: str = "here") -> None:
        """Begin a stage, and leave a mark that rank 0 sees."""
        self.stage = stage
        self.store.set(f"{stage}/{self.rank}", said)

    def wait_for_all(self) -> list[str]:
        """Wait until all ranks have reached this stage; on rank 0 what they said, by rank. Ends this process if one is late."""
        if self.rank:
            try:
                self.store.get(f"{self.stage}/go")
            except RuntimeError:
                self.fail("no answer")
            return []
        keys = [f"{self.stage}/{rank}" for rank in range(self.size)]
        while not self.store.check(keys):
            if time.monotonic() - self.began > self.limit_s:
                self.fail("no answer")
            time.sleep(0.1)
        self.store.set(f"{self.stage}/go", "go")
        return [answer.decode() for answer in self.store.multi_get(keys)]

    def fail(self, problem: str, *, another_thread: bool = False) -> NoReturn:
        """End this process. Its last line names, on rank 0, the ranks that did not reach this stage, and their nodes."""
        text = f"{problem} in the stage {self.stage!r} after {time.monotonic() - self.began:.0f} s"
        try:
            # Another connection: the main thread may be waiting on the first one.
            store = self._connect(10) if another_thread else self.store
            looked_at = range(1) if self.rank else range(self.size)
            missing = [rank for rank in looked_at if not store.check([f"{self.stage}/{rank}"])]
            if missing:
                text += f"; {self._named(missing)}"
            elif self.rank == 0:
                text += f"; all {self.size} ranks have reached it: {_ways()}"
            else:
                text += f" ({_ways()}); the log of rank 0 says who has not reached it"
        finally:
            leave(FAILED, text)

    def _named(self, missing: Sequence[int]) -> str:
        nodes = list(dict.fromkeys(filter(None, (self._node(rank) for rank in missing))))
        if self.rank == 0 and nodes:
            save_record(self.folder / "silent.json", Silent(nodes=tuple(nodes)), shared=False)
        ranks, where = (
            f"{what}{'s' * (len(some) > 1)} {_few(some)}" for what, some in (("rank", missing), ("node", nodes))
        )
        return f"{ranks} did not reach it, on {where}"

    def _node(self, rank: int) -> str:
        try:
            return load_record(self.folder / f"here-{rank // self.ranks_per_task}.json", Here).node
        except (DamagedFileError, OSError):
            return ""


def leave(code: int, text: str = "") -> NoReturn:
    """End this process at once: the threads of gloo and NCCL would wait, or abort an orderly shutdown."""
    if text:
        print(text, file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


def _few(some: Sequence[object]) -> str:
    return ", ".join(map(str, some[:_MOST_NAMED])) + " ..." * (len(some) > _MOST_NAMED)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _ways() -> str:
    """The networks that the backends were told to take."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return "check the network between the nodes, " + ", ".join(
        f"{name}={os.environ.get(name, '(unset)')}" for name in names
    )


def working_device(name: str, local_rank: int) -> Any:
    """The device that training will use, after it has added up some numbers; another exit code if it cannot."""
    import torch

    from tarflow.trainer.parallel.device import pick_device

    try:
        device = pick_device(name, local_rank)
        if device.type == "cuda" and torch.ones(1024, device=device).sum().item() != 1024:
            leave(DEVICE_FAILED, f"{device} adds up wrong")
    except (UserError, RuntimeError) as error:
        leave(
            DEVICE_FAILED,
            why(error) if isinstance(error, UserError) else f"the GPU does not work: {_first_line(error)}",
        )
    return device


def versions(device: Any) -> dict[str, str]:
    """Versions of what computes and communicates, by what has them."""
    import torch

    found = {"torch": str(torch.__version__)}
    if device.type == "cuda":
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        found |= {"driver": driver_version() or "unknown"}
    return found


def unlike_versions(found: Sequence[dict[str, str]]) -> tuple[str, str]:
    """(why ranks with these versions cannot train together, what differs but may); empty if nothing differs."""
    errors, notes = list[str](), list[str]()
    for name in dict.fromkeys(name for one in found for name in one):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(found):
            ranks.setdefault(one.get(name, "none"), []).append(rank)
        if len(ranks) > 1:
            text = f"{name} " + "; ".join(f"{version} on ranks {_few(some)}" for version, some in ranks.items())
            (notes if name == "driver" else errors).append(text)
    return ("the ranks differ in " + ", in ".join(errors) if errors else ""), ", ".join(notes)


def check_devices(check: Check, device: Any) -> str:
    """Compare the devices and versions of all ranks; ends this process if they do not go together. What there is, in words."""
    from tarflow.trainer.parallel.device import RankDevice, disagreement, rank_device

    mine = versions(device)
    check.enter("devices", json.dumps({"device": rank_device(device, check.node).text(), "versions": mine}))
    answers = [json.loads(one) for one in check.wait_for_all()]
    said = ""
    if check.rank == 0:
        found = [RankDevice(**json.loads(one["device"])) for one in answers]
        problem, differ = unlike_versions([one["versions"] for one in answers])
        nodes, models = {one.host for one in found}, sorted({one.gpu or one.kind for one in found})
        said = f"{check.size} ranks on {len(nodes)} node{'s' * (len(nodes) > 1)}: {', '.join(models)}; "
        said += ", ".join(f"{name} {version}" for name, version in mine.items())
        said += f"; note: they differ in {differ}" if differ else ""
        gpus = any(one.kind == "cuda" for one in found)
        check.store.set("verdict", json.dumps({"problem": disagreement(found) or problem, "gpus": gpus}))
    verdict = json.loads(check.store.get("verdict"))
    if verdict["problem"]:
        leave(DEVICE_FAILED if verdict["gpus"] and device.type != "cuda" else FAILED, verdict["problem"])
    return said


def reduce_once(check: Check, device: Any) -> None:
    """Sum the ranks' numbers over gloo and, on GPUs, over NCCL. Ends this process if that fails."""
    import torch
    import torch.distributed as dist

    def reduce(place: Any, group: Any) -> None:
        value = torch.full((1024,), float(check.rank + 1), device=place)
        dist.all_reduce(value, group=group)
        if not bool((value == check.size * (check.size + 1) / 2).all()):
            leave(FAILED, f"the sum over {check.size} ranks on {place} is {value[0].item()}")

    check.enter("gloo")
    check.wait_for_all()
    try:
        store = dist.PrefixStore("check", check.store)
        limit = datetime.timedelta(seconds=check.left_s)
        dist.init_process_group("gloo", store=store, rank=check.rank, world_size=check.size, timeout=limit)
        reduce("cpu", None)
        if device.type == "cuda":
            check.enter("NCCL")
            # NCCL aborts a process that waits too long, and its last words name nobody: the timer here comes before that.
            reduce(device, dist.new_group(backend="nccl", timeout=datetime.timedelta(seconds=check.limit_s + 600)))
        check.enter("end")
        check.wait_for_all()  # a rank that left earlier would take the answers of the others with it
    except RuntimeError as error:
        check.fail(_first_line(error))


def main(words: Sequence[str] | None = None) -> None:
    """Run the check as one of all ranks, with torchrun's variables set, and end the process: with 0 if all is well."""
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("limit_s", type=float)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ranks_per_task", type=int)
    parser.add_argument("node")
    args = parser.parse_args(words)
    check = Check(args.limit_s, args.folder, args.ranks_per_task, args.node)
    device = working_device(args.device, check.local)
    if check.size == 1:
        shown = ", ".join(f"{name} {version}" for name, version in versions(device).items())
        print(f"preflight: one process on {device.type}; {shown}")
        leave(0)
    check.meet()
    said = check_devices(check, device)
    reduce_once(check, device)
    if check.rank == 0:
        backends = "gloo and NCCL" if device.type == "cuda" else "gloo"
        print(f"preflight: {said}; {backends} summed over all of them in {time.monotonic() - check.began:.1f} s")
    leave(0)


if __name__ == "__main__":
    main()
