"""Steps of two real ranks, beside one process: accumulation in bfloat16, spikes, state in host memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import tarflow.trainer.optimizer
from benchmarks.golden import load, training_config
from tarflow.models.flow import FlowBlock, TarFlow
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.parallel.choose import make_backend
from tarflow.trainer.parallel.saved import place, whole
from tarflow.trainer.parallel.torch_backend import SingleBackend
from tarflow.trainer.parallel.world import World, process_group, world_from_env
from tests.helpers.ranks import launch_ranks

CPU = torch.device("cpu")


def golden_start() -> tuple[dict[str, Tensor], TarFlow]:
    """Data and weights of the golden curve; outputs moved from zero: at zero nothing else has a gradient."""
    data, model = load("training_curve")
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            assert isinstance(block, FlowBlock)
            block.proj_out.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(number))
    return data, model


@contextmanager
def two_ranks() -> Iterator[tuple[World, slice]]:
    """The group of this rank's launch, and its half of a batch of eight."""
    world = world_from_env()
    with process_group(world, CPU, 60, always=True):
        yield world, slice(4 * world.rank, 4 * world.rank + 4)


def begin(world: World, model: TarFlow, **sections: Any) -> Any:
    """A backend that holds the model's weights."""
    config = training_config(model.config, **sections)
    backend = make_backend(config, CPU, world, plan_batch(8, world.size, config.train.micro_batch_size))
    state = backend.state()
    for name, value in model.state_dict().items():
        place(state["buffer/var" if name == "var" else "model/" + name], value)
    backend.load(state)
    return backend


def weights(backend: Any) -> dict[str, Tensor]:
    return {n.removeprefix("model/"): whole(t).clone() for n, t in backend.state().items() if n.startswith("model/")}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    return sum(not torch.equal(before[n], after[n]) for n in before)


def spikes_on_one_rank(backends: list[dict[str, Any]]) -> None:
    """A rank: images of rank 1 alone make the norm of two gradients jump."""
    # The full number takes a while; in one process it is held to elsewhere.
    warmup = tarflow.trainer.optimizer.WARMUP = 4
    data, model = golden_start()
    x, y = data["x"][0].clone(), data["y"][0].clone()
    with two_ranks() as (world, mine):
        for parallel in backends:
            backend = begin(world, model, parallel=parallel, train={"skip_spikes": True})
            noise = torch.Generator().manual_seed(world.rank)
            for step in range(warmup + 4):
                images = x[mine] + 0.05 * torch.randn(x[mine].shape, generator=noise)
                if step >= warmup + 1 and step < warmup + 3 and world.rank == 1:
                    images[0] *= 8
                before = weights(backend) if step >= warmup else {}
                backend.forward_backward(images, y[mine], 1.0, True)
                norm = float(backend.optimizer_step(1e-5))
                expected = [0, 0] if step <= warmup else [[1, 1], [2, 2], [2, 0]][step - warmup - 1]
                assert backend.skipped().tolist() == expected, (parallel, step, norm, backend.skipped())
                if before:
                    taken = step in (warmup, warmup + 3)
                    assert bool(moved(before, weights(backend))) == taken, (parallel, step)


def optimizer_state_in_host_memory(backends: list[dict[str, Any]]) -> None:
    """A rank: the losses of the first backend are those of all, over a step that is not finite on rank 1."""
    data, model = golden_start()
    reference = None
    with two_ranks() as (world, mine):
        for parallel in backends:
            backend = begin(world, model, parallel=parallel, train={"grad_clip": 0.4})
            if parallel.get("offload_optimizer"):
                assert all(t.device.type == "cpu" for s in backend.optimizer.state.values() for t in s.values())
                assert backend._zero.cpu_offload if parallel["zero_stage"] < 3 else backend._zero.offload_optimizer
            losses = []
            for step in range(3):
                bad = step == 1 and world.rank == 1
                images = torch.full_like(data["x"][0][mine], float("nan")) if bad else data["x"][step][mine]
                before = weights(backend)
                losses.append(backend.forward_backward(images, data["y"][step][mine], 1.0, True)[0])
                backend.optimizer_step(1e-3)
                assert bool(moved(before, weights(backend))) == (step != 1), (parallel, step)
            assert backend.skipped().tolist() == [1, 0]
            finite = torch.stack([loss for k, loss in enumerate(losses) if k != 1])
            reference = finite if reference is None else reference
            assert torch.allclose(finite, reference, rtol=1e-5), (parallel, finite, reference)


@pytest.mark.case("T12", "T14")
def test_spikes_on_one_rank_are_skipped_by_all_and_host_memory_changes_nothing() -> None:
    parallel = [{"backend": "ddp"}, {"backend": "fsdp2"}, {"backend": "deepspeed", "zero_stage": 3}]
    launch_ranks(spikes_on_one_rank, 2, parallel)
    offloaded = [{"backend": "deepspeed", "zero_stage": stage, "offload_optimizer": True} for stage in (2, 3)]
    launch_ranks(optimizer_state_in_host_memory, 2, [{"backend": "ddp"}, *offloaded])


# Micro-batches of one class each: the others' rows of the class embedding get no gradient in them.
LABELS = [0, 0, 1, 1, -1, -1, 2, 2]


def gradients_of_two_micro_batches() -> dict[str, dict[str, Tensor]]:
    """A rank: backend -> the whole gradients, the same on both."""
    data, model = golden_start()
    found = {}
    backends: dict[str, dict[str, Any]] = {"ddp": {"backend": "ddp"}, "fsdp2": {"backend": "fsdp2"}}
    backends["fsdp2 by layer"] = {"backend": "fsdp2", "layers_per_unit": 1}
    with two_ranks() as (world, mine):
        labels = torch.tensor(LABELS)[mine]
        for backend_name, parallel in backends.items():
            train = {"param_dtype": "bfloat16", "micro_batch_size": 2}
            backend = begin(world, model, parallel=parallel, train=train)
            for k in range(2):
                part = slice(2 * k, 2 * k + 2)
                backend.forward_backward(data["x"][0][mine][part], labels[part], 0.5, k == 1)
            backend._collect_gradients()
            grads = {n: p.grad for n, p in backend.locals().items()}
            assert all(g.dtype == torch.float32 for g in grads.values())
            found[backend_name] = {n: whole(backend.to_saved(n, g)).clone() for n, g in grads.items()}
    assert all(torch.equal(g, found["fsdp2"][n]) for n, g in found["fsdp2 by layer"].items())
    return found


@pytest.mark.case("T12")
def test_accumulation_in_bfloat16_sums_in_float32_also_where_a_micro_batch_uses_no_row() -> None:
    of_two_ranks = launch_ranks(gradients_of_two_micro_batches, 2).values[0]
    data, model = golden_start()
    config = training_config(model.config, train={"param_dtype": "bfloat16", "micro_batch_size": 2})
    backend = SingleBackend(model, config, CPU)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for k in range(4):
        part = slice(2 * k, 2 * k + 2)
        backend.forward_backward(data["x"][0][part], torch.tensor(LABELS)[part], 0.25, k == 3)
    torch.set_num_threads(threads)
    backend._collect_gradients()
    for name, found in of_two_ranks.items():
        for parameter, master in backend.locals().items():
            ours, truth = found[parameter], master.grad
            assert truth is not None
            size = float(truth.abs().max())
            assert float((ours - truth).abs().max()) <= 1e-5 * size + 1e-12, (name, parameter)
        assert found["blocks.0.class_embed"].abs().sum((1, 2)).min() > 0, name
