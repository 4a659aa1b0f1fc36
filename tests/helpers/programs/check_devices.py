"""The check of devices before the first step, as a rank whose device is FAKE_DEVICE: `cuda GPU-7` or `cpu`; no GPU is touched.

NCCL waits for ever. A rank hangs before the stage FAKE_HANG.
"""

import json
import os
import time

import torch
import torch.distributed as dist

from tarflow.cluster.job import all_reduce
from tarflow.trainer.parallel import device as rank_devices

kind, _, uuid = os.environ.get("FAKE_DEVICE", "cpu").partition(" ")


def described(device: torch.device, host: str | None = None) -> rank_devices.RankDevice:
    return rank_devices.RankDevice(host or "?", device.type, "H100" if uuid else "", uuid)


rank_devices.rank_device = described
all_reduce.working_device = lambda name, local_rank: torch.device(kind)
if "FAKE_VERSIONS" in os.environ:
    all_reduce.versions = lambda device: dict(json.loads(os.environ["FAKE_VERSIONS"]))


def wait_for_ever(**_: object) -> None:
    time.sleep(600)


def enter(check: all_reduce.Check, stage: str, said: str = "here") -> None:
    if stage == os.environ.get("FAKE_HANG"):
        wait_for_ever()
    real_enter(check, stage, said)


real_enter = all_reduce.Check.enter
all_reduce.Check.enter = enter  # type: ignore[method-assign,assignment]
dist.new_group = wait_for_ever  # type: ignore[assignment]
all_reduce.SPARE_S = 1.0
all_reduce.main()
