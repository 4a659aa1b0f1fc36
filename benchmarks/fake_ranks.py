"""One rank of 1,024, on one machine without a cluster: the fsdp2 plan of the paper's largest model on fake tensors.

The rank really builds the backend, takes a training step and keeps averages, through the code that a cluster runs; its
tensors have shapes and storages but no numbers, and its process group answers at once. Counted are the bytes of the
storages alive, by what they are for, against `tarflow.trainer.plan.rank_memory`. Bar: within 10% of the cost model. It speaks
of the fullest rank: one with fewer rows pads weights and gradients to as much, but not moments and averages.

The fake tensors say that they are on the CPU, and the plan is for accelerators. At the preset's 1,024 tokens attention
is torch's own on both; the formula of short sequences would double the activations and miss the bar.

A step on fake tensors has no numbers that the host could read: it fails where a real one would wait for the device.
"""

import sys
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tarflow.trainer.parallel.torch_backend as torch_backend
from benchmarks.common import Bar, finish, parse_args
from benchmarks.golden import training_config
from tarflow.models.presets import preset
from tarflow.trainer.config.schema import Config
from tarflow.trainer.ema.ema import EMA
from tarflow.trainer.parallel.world import World
from tarflow.trainer.plan import RankMemory, rank_memory

RANKS = 1024
PRESET = "imagenet256-8-1280-8-8"
# Name: (pieces of a copy, activation checkpointing, the rank looked at).
PLANS = {
    "128 copies of 8 pieces, full": (8, "full", 0),
    "128 copies of 8 pieces, selective": (8, "selective", 0),
    "128 copies of 8 pieces, none": (8, "none", 0),
    "1 copy of 1,024 pieces, first rank": (1024, "full", 0),
    "1 copy of 1,024 pieces, last rank": (1024, "full", RANKS - 1),
}
QUICK = ("128 copies of 8 pieces, full", "128 copies of 8 pieces, none")
KINDS = ("weights", "gradients", "optimizer", "averages", "activations")


def plan_config(shard: int, mode: str) -> Config:
    """The preset in bfloat16, one image per rank and step."""
    return training_config(
        preset(PRESET),
        train={"global_batch_size": RANKS, "max_images": 10 * RANKS, "param_dtype": "bfloat16", "grad_clip": 1.0},
        parallel={"backend": "fsdp2", "dp_shard": shard, "world_size": RANKS},
        activation_checkpoint={"mode": mode},
    )


class Alive(TorchDispatchMode):
    """Knows the storages of all tensors that operations gave, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(answer):
            if isinstance(leaf, Tensor):
                storage = _local(leaf).untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)
        return answer

    def bytes(self) -> int:
        alive = {key: ref() for key, ref in self._storages.items()}
        self._storages = {key: self._storages[key] for key, storage in alive.items() if storage is not None}
        return sum(storage.nbytes() for storage in alive.values() if storage is not None)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors; of a sharded one, this rank's piece."""
    storages = {s._cdata: s.nbytes() for s in (_local(t).untyped_storage() for t in tensors)}
    return sum(storages.values())


def _really(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without fake tensors: the mesh reads its ranks, and cutting meta tensors is fast."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


@contextmanager
def fake_world(rank: int) -> Any:
    """Make this process one rank of RANKS whose collectives return at once."""
    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    try:
        names = ("init_device_mesh", "TarFlow", "apply_parallelism")
        patches: dict[str, Any] = {name: _really(getattr(torch_backend, name)) for name in names}
        patches["initial_values"] = lambda *_: ()  # fake tensors take no values
        with mock.patch.multiple(torch_backend, **patches):
            yield World(rank, RANKS, 0)
    finally:
        dist.destroy_process_group()


def measure(config: Config, rank: int) -> RankMemory:
    """Bytes that one rank holds in a training step, as the real backend allocates them."""
    with fake_world(rank) as world, FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        backend = torch_backend.ShardedBackend(config, torch.device("cpu"), world)
        ema = EMA(backend, config.ema.relative_stds)
        images, labels = torch.empty(1, *config.model.image_shape), torch.empty(1, dtype=torch.long)
        before = alive.bytes()
        z, logdet = backend.model(images, labels)
        activations = alive.bytes() - before
        loss = torch_backend.flow_loss(z, logdet).mean()
        del z, logdet
        loss.backward()
        gradients = storage_bytes(p.grad for p in backend.model.parameters() if p.grad is not None)
        backend.optimizer_step(1e-4)
        ema.update(RANKS, RANKS)
        moments = [t for s in backend.optimizer.state.values() for n, t in s.items() if n != "step"]
        averages = [t for average in ema.averages.values() for t in average.values()]
        return RankMemory(
            weights=storage_bytes(backend.model.parameters()),
            gradients=gradients,
            optimizer=storage_bytes(moments),
            averages=storage_bytes(averages),
            gathered=float("nan"),  # comes and goes within the step
            activations=activations,
        )


def main() -> int:
    args = parse_args("Bytes per rank of 1,024 against the cost model.")
    rows, bars = [], []
    for name in QUICK if args.quick else PLANS:
        shard, mode, rank = PLANS[name]
        config = plan_config(shard, mode)
        began = time.perf_counter()
        found, expected = measure(config, rank), rank_memory(config, RANKS)
        seconds = time.perf_counter() - began
        ratios = {kind: getattr(found, kind) / getattr(expected, kind) for kind in KINDS}
        for kind, ratio in ratios.items():
            rows.append((name, kind, getattr(found, kind) / 2**20, getattr(expected, kind) / 2**20, ratio, seconds))
        if rank == 0:
            worst = max(abs(ratio - 1) for ratio in ratios.values())
            bars.append(Bar(f"{name}: worst error", worst, at_most=0.1, reason="the bytes the cost model says"))
        else:
            most = max(ratios.values())
            bars.append(Bar(f"{name}: most of the estimate", most, at_most=1.1, reason="the fullest rank is estimated"))
    header = ("plan", "what", "MiB, allocated", "MiB, cost model", "of it", "seconds")
    return finish(args, rows, header, bars)


if __name__ == "__main__":
    sys.exit(main())
