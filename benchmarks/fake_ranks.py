"""One rank of 1,024, on one machine without a cluster: what it holds in a training step against the plan of its memory.

The rank really builds the backend, takes a training step and keeps averages, through the code that a cluster runs; its
process group answers at once. Counted are the bytes of the storages alive, by what they are for and at the highest moment,
against `tarflow.trainer.parallel.memory.rank_memory`. Bar: within 10% of the plan. It speaks of the fullest rank: one with
fewer rows pads weights and gradients to as much, but not moments and averages.

Torch's own engines run the paper's largest model, whole or cut to two layers a block, on fake tensors: these have shapes and
storages but no numbers. They say that they are on the CPU, and the plan is for accelerators. At the preset's 1,024 tokens
attention is torch's own on both; the formula of short sequences would double the activations and miss the bar. A step on
fake tensors fails where a real one would wait for the device, which has no numbers for the host to read.

DeepSpeed looks into its tensors, so that its rank, one of 16 or of 1,024, has real ones, of a small model.
"""

import multiprocessing
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before DeepSpeed replaces constructors, which this module looks at
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
from tarflow.models.config import TarFlowConfig
from tarflow.models.presets import preset
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.config.schema import Config
from tarflow.trainer.ema.ema import EMA
from tarflow.trainer.parallel.memory import rank_memory
from tarflow.trainer.parallel.world import World
from tarflow.trainer.stats import training_loss

RANKS = 1024
CPU = torch.device("cpu")
WHOLE = preset("imagenet256-8-1280-8-8")
CUT = WHOLE.model_copy(update={"layers_per_block": 2})
# More tokens than those for which the CPU writes attention out.
DEEP = WHOLE.model_copy(update={"num_blocks": 4, "layers_per_block": (1, 1, 1, 5)})
TOLD = DEEP.model_copy(update={"noise_conditioning": True})
SMALL = TarFlowConfig(image_size=80, patch_size=4, channels=256, num_blocks=4, layers_per_block=4, num_classes=10)
LARGE = 2**12  # bytes
Counted = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """A step to count: one image a micro-batch."""

    parallel: dict[str, Any]
    mode: str = "full"
    accumulation: int = 1
    rank: int = 0
    ranks: int = RANKS
    shape: TarFlowConfig = field(default=CUT)

    @property
    def zero(self) -> bool:
        return self.parallel["backend"] == "deepspeed"

    @property
    def keeps_weights(self) -> bool:
        """Whether gathered weights are there beside the activations."""
        return self.parallel["backend"] == "ddp" or self.parallel.get("reshard_after_forward") == "never"

    @property
    def config(self) -> Config:
        images = self.ranks * self.accumulation
        return training_config(
            self.shape,
            train={
                "global_batch_size": images, "micro_batch_size": 1, "max_images": 10 * images, "param_dtype": "bfloat16",
                "grad_clip": 1.0, **({"noise_range": [0.01, 0.3], "noise_std": 0.0} if self.shape.noise_conditioning else {}),
            },
            parallel={"world_size": self.ranks, **self.parallel},
            activation_checkpoint={"mode": self.mode},
        )  # fmt: skip


HSDP = {"backend": "fsdp2", "dp_shard": 8}
FSDP = {"backend": "fsdp2", "dp_shard": RANKS}
PLANS = {
    "HSDP 128 x 8, full, whole model": Plan(HSDP, "full", shape=WHOLE),
    "HSDP 128 x 8, none, whole model": Plan(HSDP, "none", shape=WHOLE),
    "HSDP 128 x 8, full": Plan(HSDP),
    "HSDP 128 x 8, selective": Plan(HSDP, "selective"),
    "HSDP 128 x 8, none": Plan(HSDP, "none"),
    "HSDP 128 x 8, none, deep-shallow": Plan(HSDP, "none", shape=DEEP),
    "HSDP 128 x 8, full, deep-shallow": Plan(HSDP, shape=DEEP),
    "HSDP 128 x 8, full, deep-shallow, told the noise": Plan(HSDP, shape=TOLD),
    "HSDP 128 x 8, full, 4 micro-batches": Plan(HSDP, accumulation=4),
    "HSDP 128 x 8, full, deep-shallow, 4 micro-batches": Plan(HSDP, accumulation=4, shape=DEEP),
    "HSDP 128 x 8, none, weights kept": Plan(HSDP | {"reshard_after_forward": "never"}, "none"),
    "HSDP 128 x 8, full, by layer, 2 ahead": Plan(HSDP | {"layers_per_unit": 1, "prefetch_units": 2}),
    "fsdp2 1 x 1,024, first rank": Plan(FSDP),
    "fsdp2 1 x 1,024, last rank": Plan(FSDP, rank=RANKS - 1),
    "fsdp2 1 x 1,024, 4 micro-batches": Plan(FSDP, accumulation=4),
    "ddp": Plan({"backend": "ddp"}),
    "ddp, 4 micro-batches": Plan({"backend": "ddp"}, accumulation=4),
    **{
        f"ZeRO-{stage}, {mode}, {accumulation} micro-batches": Plan(
            {"backend": "deepspeed", "zero_stage": stage}, mode, accumulation, ranks=16, shape=SMALL
        )
        for stage, mode, accumulation in (
            (1, "full", 1), (1, "none", 4), (2, "full", 1), (2, "none", 4), (3, "full", 1), (3, "none", 1), (3, "none", 4),
        )
    },
    "ZeRO-3, none, told the noise": Plan(
        {"backend": "deepspeed", "zero_stage": 3}, "none", ranks=16,
        shape=SMALL.model_copy(update={"noise_conditioning": True}),
    ),
    **{
        f"ZeRO-{stage} x 1,024": Plan({"backend": "deepspeed", "zero_stage": stage}, "none", shape=SMALL)
        for stage in (1, 2, 3)
    },
}  # fmt: skip
QUICK = (
    "HSDP 128 x 8, full",
    "HSDP 128 x 8, none",
    "HSDP 128 x 8, none, deep-shallow",
    "HSDP 128 x 8, full, deep-shallow, 4 micro-batches",
    "HSDP 128 x 8, full, deep-shallow, told the noise",
    "ZeRO-3, none, 1 micro-batches",
)


class Alive(TorchDispatchMode):
    """Knows the storages of all tensors that operations gave, as long as they live; those of `smallest` bytes or more."""

    def __init__(self, smallest: int = 1) -> None:
        super().__init__()
        self._smallest = smallest
        self._settled: dict[int, Any] = {}
        self._storages: dict[int, Any] = {}
        self.peak = 0.0  # since `settle`, of what came after it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        fresh = False
        for leaf in (answer,) if isinstance(answer, Tensor) else tree_leaves(answer):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                storage = _local(leaf).untyped_storage()
                size = storage.nbytes()
                # Adding up takes time, and hundreds of thousands of pieces of a few bytes are cut and padded in a step of
                # DeepSpeed on 1,024 ranks: they count, but no sum is taken when they come.
                fresh |= size >= self._smallest and self._note(storage) and size >= LARGE
        if fresh:
            self.peak = max(self.peak, self.bytes())
        return answer

    def _note(self, storage: Any) -> bool:
        key = storage._cdata
        known = self._settled.get(key) or self._storages.get(key)
        if known is not None and known() is not None:
            return False
        self._storages[key] = weakref.ref(storage)
        return True

    def bytes(self) -> int:
        """Of the storages that came after `settle` and live."""
        alive = {key: ref() for key, ref in self._storages.items()}
        self._storages = {key: self._storages[key] for key, storage in alive.items() if storage is not None}
        return sum(storage.nbytes() for storage in alive.values() if storage is not None)

    def settle(self) -> int:
        """Bytes of all that live now: what `bytes` and `peak` do not count from here on."""
        self._settled |= self._storages
        self._storages, self.peak = {}, 0.0
        return sum(storage.nbytes() for ref in self._settled.values() if (storage := ref()) is not None)


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
def fake_world(rank: int, ranks: int) -> Iterator[World]:
    """Make this process one of `ranks` whose collectives return at once."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield World(rank, ranks, 0)
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors without numbers, in torch's own engines."""
    names = ("init_device_mesh", "TarFlow", "apply_parallelism")
    patches: dict[str, Any] = {name: _really(getattr(torch_backend, name)) for name in names}
    patches["initial_values"] = lambda *_: ()  # fake tensors take no values
    with mock.patch.multiple(torch_backend, **patches), FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextmanager
def views_unseen() -> Iterator[None]:
    """Count no views, which have no bytes of their own.

    DeepSpeed's stage 3 cuts several for each weight, rank and step: with 200 weights on 1,024 ranks that is most of a
    million, and looking at each of them took most of ten minutes.
    """

    def narrow(*args: Any, **kwargs: Any) -> Tensor:
        with torch._C._DisableTorchDispatch():
            return whole_narrow(*args, **kwargs)

    def item(tensor: Tensor, index: Any) -> Tensor:
        if not isinstance(index, slice):  # indexing by tensors makes others
            return whole_item(tensor, index)
        with torch._C._DisableTorchDispatch():
            return whole_item(tensor, index)

    whole_narrow, whole_item = Tensor.narrow, Tensor.__getitem__
    with mock.patch.multiple(Tensor, narrow=narrow, __getitem__=item):
        yield


def measure(plan: Plan) -> Counted:
    """Bytes that one rank holds in a training step, as the real backend allocates them."""
    config = plan.config
    with ExitStack() as stack:
        world = stack.enter_context(fake_world(plan.rank, plan.ranks))
        if plan.zero:
            from tarflow.trainer.parallel.zero import ZeroBackend

            stack.enter_context(views_unseen())
            alive = stack.enter_context(Alive())
            batch = plan_batch(config.train.global_batch_size, plan.ranks, 1)
            backend: Any = ZeroBackend(config, CPU, world, batch)
        else:
            stack.enter_context(fake_tensors())
            alive = stack.enter_context(Alive(smallest=2**16))
            backend = torch_backend.ShardedBackend(config, CPU, world)
        ema = EMA(backend, config.ema.relative_stds)
        for _ in range(1 + 2 * plan.zero):  # DeepSpeed gathers ahead once it has seen a whole step
            found = _step(backend, ema, plan, alive)
        return found


def _step(backend: Any, ema: EMA, plan: Plan, alive: Alive) -> Counted:
    """Count one training step."""
    held, kept, gradients = alive.settle(), [], 0.0
    images, labels = torch.zeros(1, *plan.shape.image_shape), torch.zeros(1, dtype=torch.long)
    levels = torch.full((1,), 0.1) if plan.shape.noise_conditioning else None
    module = sys.modules[type(backend).__module__]

    def noting(*given: Any) -> Tensor:
        kept.append(alive.bytes())  # between forward and backward pass
        return training_loss(*given)

    with mock.patch.object(module, "training_loss", noting):
        for number in range(1, plan.accumulation + 1):
            backend.forward_backward(images, labels, 1 / plan.accumulation, number == plan.accumulation, levels)
            if number == 1:
                gradients = alive.bytes()
    if plan.accumulation == 1 and not plan.zero:  # besides them, a buffer of the last unit is left
        gradients = storage_bytes(p.grad for p in backend.model.parameters() if p.grad is not None)
    backend.optimizer_step(1e-4)
    ema.update(RANKS, RANKS)
    moments = [t for s in backend.optimizer.state.values() for n, t in s.items() if n != "step"]
    averages = [t for average in ema.averages.values() for t in average.values()]
    found = {"optimizer": storage_bytes(moments), "averages": storage_bytes(averages), "total": held + alive.peak}
    if plan.zero:  # its flat partitions belong to several uses at once
        return found | ({"held": held - found["averages"]} if backend.stage == 3 else {})
    found |= {"weights": storage_bytes(backend.model.parameters()), "gradients": gradients}
    return found if plan.keeps_weights else {**found, "activations": kept[0]}


def count(name: str) -> Counted:
    """`measure` in a process of its own where the engine takes only one run in each: a fork, before this one computes."""
    if not PLANS[name].zero:
        return measure(PLANS[name])
    forks = multiprocessing.get_context("fork")
    answers, sends = forks.Pipe(duplex=False)
    process = forks.Process(target=lambda: sends.send(measure(PLANS[name])))
    process.start()
    sends.close()
    try:
        found: Counted = answers.recv()
    except EOFError:
        raise RuntimeError(f"{name}: no answer, see above") from None
    process.join()
    return found


def main() -> int:
    args = parse_args("Bytes per rank of 1,024 against the plan.")
    rows, bars = [], []
    for name in sorted(QUICK if args.quick else PLANS, key=lambda name: not PLANS[name].zero):
        plan = PLANS[name]
        began = time.perf_counter()
        found, expected = count(name), rank_memory(plan.config, plan.ranks)
        seconds = time.perf_counter() - began
        ratios = {kind: found[kind] / getattr(expected, kind) for kind in found}
        for kind, ratio in ratios.items():
            rows.append((name, kind, found[kind] / 2**20, getattr(expected, kind) / 2**20, ratio, seconds))
        if plan.rank == 0:
            worst = max(abs(ratio - 1) for ratio in ratios.values())
            bars.append(Bar(f"{name}: worst error", worst, at_most=0.1, reason="the bytes that the plan says"))
        else:
            most = max(ratios.values())
            bars.append(Bar(f"{name}: most of the estimate", most, at_most=1.1, reason="the fullest rank is estimated"))
    header = ("plan", "what", "MiB, counted", "MiB, planned", "of it", "seconds")
    return finish(args, rows, header, bars)


if __name__ == "__main__":
    sys.exit(main())
