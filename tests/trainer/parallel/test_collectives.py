"""What goes over the wire: dtype and amount of every collective of a step, read from real ranks."""

import os
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.golden import training_config
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import parameters
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.parallel.choose import make_backend
from tarflow.trainer.parallel.world import World, process_group, world_from_env
from tarflow.trainer.parallel.zero import name_device
from tests.helpers.ranks import launch_ranks

CPU = torch.device("cpu")
SHAPE = TarFlowConfig(image_size=8, patch_size=2, channels=64, num_blocks=2, layers_per_block=2, num_classes=4)
SMALL = 16  # numbers: norms and counters, which no setting is about
BACKENDS: dict[str, dict[str, Any]] = {
    "fsdp2": {"backend": "fsdp2"},
    "ddp": {"backend": "ddp"},
    **{f"ZeRO-{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)},
}


class Collectives(TorchDispatchMode):
    """Numbers sent, by kind of collective (`gather`, `reduce`) and dtype; and how many ranks the groups have."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[tuple[str, str]] = Counter()
        self.groups: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and func.__name__.split(".")[0] in ("mm", "addmm"):
            self.numbers["product", str(args[-1].dtype).removeprefix("torch.")] += 1
        if func.namespace == "c10d":
            self.groups.update(_sizes_of_groups(args))
            kind = next((kind for kind in ("gather", "reduce") if kind in func.__name__), func.__name__)
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            whole = max(tensors, key=lambda t: t.numel())  # of a piece and the whole
            if whole.numel() > SMALL:
                self.numbers[kind, str(whole.dtype).removeprefix("torch.")] += whole.numel()
        return func(*args, **(kwargs or {}))


def _sizes_of_groups(args: Any) -> list[int]:
    boxed = [a for a in args if isinstance(a, torch.ScriptObject) and a._type().name() == "ProcessGroup"]  # type: ignore[attr-defined]
    return [dist.ProcessGroup.unbox(group).size() for group in boxed]


Found = tuple[dict[tuple[str, str], int], float, dict[int, int]]


def collectives_of_a_step(settings: list[dict[str, Any]]) -> list[Found]:
    """A rank: for each backend, what the second step of two micro-batches sends, its loss, and collectives by ranks."""
    world, found = world_from_env(), []
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(world.rank))
    labels = torch.tensor([0, 1, -1, 3])
    with process_group(world, CPU, 60, always=True):
        for parallel in settings:
            train = {"param_dtype": "bfloat16", "global_batch_size": 4 * world.size, "micro_batch_size": 2}
            config = training_config(SHAPE, train=train, parallel=parallel)
            backend = make_backend(config, CPU, world, plan_batch(4 * world.size, world.size, 2))
            for _ in range(2):
                with Collectives() as sent:
                    stats = torch.zeros(3)
                    for part in (slice(0, 2), slice(2, 4)):
                        stats += backend.forward_backward(images[part], labels[part], 0.5, part.stop == 4)
                    backend.optimizer_step(1e-2)
            assert torch.isfinite(backend.skipped()).all()
            assert backend.skipped().tolist() == [0, 0]
            found.append((dict(sent.numbers), float(stats[0]), dict(sent.groups)))
    return found


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_every_gradient_is_reduced_in_the_configured_dtype_and_every_weight_gathered_in_its_own(
    reduce_dtype: str,
) -> None:
    settings = [{**parallel, "reduce_dtype": reduce_dtype} for parallel in BACKENDS.values()]
    found = dict(zip(BACKENDS, launch_ranks(collectives_of_a_step, 2, settings).values[0]))
    losses = [loss for _, loss, _ in found.values()]
    assert max(losses) - min(losses) < 1e-3 * abs(losses[0])
    for name, (sent, _, groups) in found.items():
        assert groups.keys() == {2}, (name, groups)  # none over a single rank, whose mesh has one replica
        gradients = {dtype: n for (kind, dtype), n in sent.items() if kind == "reduce"}
        weights = {dtype: n for (kind, dtype), n in sent.items() if kind == "gather"}
        assert gradients.keys() == {reduce_dtype}, (name, sent)
        assert gradients[reduce_dtype] >= parameters(SHAPE), (name, sent)
        # Stages 1 and 2 exchange the updated masters once a step.
        assert weights.keys() <= {"float32" if name in ("ZeRO-1", "ZeRO-2") else "bfloat16"}, (name, sent)
        assert bool(weights) == (name != "ddp"), (name, sent)
        assert {dtype for kind, dtype in sent if kind == "product"} == {"bfloat16"}, (name, sent)
        assert {kind for kind, _ in sent} <= {"gather", "reduce", "product"}, (name, sent)


def steps_of_engines(settings: list[dict[str, Any]]) -> list[float]:
    """A rank: the loss of the third step by each way to gather, with selective checkpointing."""
    world, losses = world_from_env(), []
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(world.rank))
    with process_group(world, CPU, 60, always=True):
        for parallel in settings:
            config = training_config(
                SHAPE, train={"global_batch_size": 4, "param_dtype": "float32"}, parallel=parallel,
                activation_checkpoint={"mode": "selective"},
            )  # fmt: skip
            backend = make_backend(config, CPU, world, plan_batch(4, world.size, 0))
            for _ in range(3):
                loss = backend.forward_backward(images, torch.tensor([0, -1]), 1.0, True)[0]
                backend.optimizer_step(1e-2)
            losses.append(float(loss))
    return losses


def test_resharding_prefetching_and_units_change_no_loss_and_go_with_selective_checkpointing() -> None:
    """Stage 3 gathers within the recomputation, which selective checkpointing took for other operations."""
    ways: list[dict[str, Any]] = [
        {"backend": engine, "reshard_after_forward": reshard, "prefetch_units": ahead, "layers_per_unit": unit}
        for engine in ("fsdp2", "deepspeed")
        for reshard, ahead, unit in (("always", 0, 0), ("always", 2, 1), ("never", 1, 2))
    ]
    losses = launch_ranks(steps_of_engines, 2, ways).values[0]
    for of_engine in (losses[:3], losses[3:]):
        assert of_engine == pytest.approx([of_engine[0]] * 3, rel=1e-5)
    # From outputs of zero, AdamW makes steps of rounding errors; `benchmarks.parity` compares engines from elsewhere.
    assert losses[3] == pytest.approx(losses[0], rel=0.05)


def a_run_alone(stages: list[int]) -> list[float]:
    """A process without a launcher: losses of three steps on the same images, by stage."""
    assert not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} & set(os.environ)
    images, labels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, -1, 3])
    losses = []
    with process_group(world_from_env(), CPU, 60, always=True):
        for stage in stages:
            parallel = {"backend": "deepspeed", "zero_stage": stage}
            config = training_config(SHAPE, train={"global_batch_size": 4}, parallel=parallel)
            backend = make_backend(config, CPU, world_from_env(), plan_batch(4, 1, 0))
            for _ in range(3):
                loss = backend.forward_backward(images, labels, 1.0, True)[0]
                backend.optimizer_step(1e-2)
            losses.append(float(loss))
    return losses


def test_deepspeed_runs_without_a_launcher() -> None:
    losses = launch_ranks(a_run_alone, 1, [1, 2, 3]).values[0]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert losses[0] < 0.49  # half a unit variance is where every flow starts


def test_deepspeed_takes_the_device_that_the_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is shown one GPU alone, as with `srun --gpus-per-task=1`, has device 0 wherever it is in its node."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    name_device(torch.device("cuda", 0), World(rank=11, size=16, local_rank=3))
    assert os.environ["LOCAL_RANK"] == "0"
    name_device(CPU, World(rank=11, size=16, local_rank=3))
    assert os.environ["LOCAL_RANK"] == "3"
