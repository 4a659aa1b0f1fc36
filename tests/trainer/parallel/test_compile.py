"""Compiling the layers under every way of activation checkpointing: it really happens, once, and changes nothing.

Most of it runs the compiler's front half (`aot_eager`): graphs, recomputation and their guards, without the minutes that
generating code takes. One test generates code. A compiler's backward pass starts threads of autograd, after which no fork of a
process can take a gradient: all of it is computed in processes of its own.
"""

from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters

from benchmarks.activation_checkpointing import KeptBytes
from benchmarks.golden import load, training_config
from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import FlowBlock, TarFlow, flow_loss
from tarflow.models.init import init_weights
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.parallel.apply import apply_parallelism
from tarflow.trainer.parallel.choose import make_backend
from tarflow.trainer.parallel.saved import place, whole
from tarflow.trainer.parallel.world import process_group, world_from_env
from tests.helpers.ranks import launch_ranks

MODES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "full": {"mode": "full"},
    "selective": {"mode": "selective"},
    "every 2nd": {"mode": "selective", "every_nth_layer": 2},
    "offload": {"mode": "full", "offload": True},
}
# Layers of a flow share one graph; checkpointed and plain layers are two kinds; an offloaded one runs without gradients
# first. A batch of another size adds a graph, for any size, to each.
GRAPHS = {"none": 1, "full": 1, "selective": 1, "every 2nd": 2, "offload": 2}
GRID = [(mode, 128) for mode in MODES] + [("selective", 256)]


def compile_front_half() -> None:
    """Compile with `aot_eager` whoever asks for the default in this process."""
    patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")).start()


def build(mode: str, width: int, compiled: bool) -> TarFlow:
    """Two layers in each of two blocks, with outputs that are not zero."""
    shape = TarFlowConfig(image_size=8, patch_size=2, channels=width, num_blocks=2, layers_per_block=2)
    model = TarFlow(shape)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            assert isinstance(block, FlowBlock)
            block.proj_out.weight.normal_(0, 0.02, generator=generator)
    settings: dict[str, Any] = {"activation_checkpoint": MODES[mode], "compile": {"enable": compiled}}
    apply_parallelism(model, training_config(shape, **settings), mesh=None)
    return model


def losses(model: TarFlow, batches: tuple[int, ...]) -> list[float]:
    """Of one forward and backward pass for each batch; gradients add up."""
    found = []
    for size in batches:
        x = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(size))
        loss = flow_loss(*model(x)).mean()
        loss.backward()
        found.append(float(loss.detach()))
    return found


def compare(mode: str, width: int, batches: tuple[int, ...]) -> None:
    plain, compiled = (build(mode, width, c) for c in (False, True))
    assert losses(compiled, batches) == pytest.approx(losses(plain, batches), rel=1e-4)
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters()):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()) + 1e-8), name
    assert list(plain.state_dict()) == list(compiled.state_dict()) == list(TarFlow(plain.config).state_dict())


def agree_in_the_front_half(mode: str, width: int) -> None:
    """A rank: compiled and plain, then batches of other sizes."""
    compile_front_half()
    compare(mode, width, (4, 4, 4))
    assert counters["stats"]["unique_graphs"] == GRAPHS[mode]
    assert not counters["graph_break"]
    if width == 128:
        compiled = build(mode, width, True)
        compiled.load_state_dict(build(mode, width, False).state_dict())  # strict: a plain checkpoint fits
        assert losses(compiled, (4, 3, 2)) == pytest.approx(losses(build(mode, width, False), (4, 3, 2)), rel=1e-4)
        assert counters["stats"]["unique_graphs"] <= 2 * GRAPHS[mode]


@pytest.mark.parametrize(("mode", "width"), GRID)
@pytest.mark.case("T11")
def test_checkpointing_and_compile_agree_with_plain_and_share_one_graph(mode: str, width: int) -> None:
    launch_ranks(agree_in_the_front_half, 1, mode, width)


def agree_generated() -> None:
    torch._inductor.config.cpp.vec_isa_ok = True  # instead of a compilation to find out
    compare("full", 128, (4,))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.case("T11")
def test_generated_code_agrees_with_plain() -> None:
    launch_ranks(agree_generated, 1)


def kept_by_mode() -> dict[str, int]:
    """A rank: bytes that a compiled forward pass keeps."""
    compile_front_half()
    found = {}
    for mode in ("none", "full", "selective"):
        torch._dynamo.reset()
        model = build(mode, 128, True)
        losses(model, (4,))
        counter = KeptBytes(model)
        with counter:
            losses(model, (4,))
        found[mode] = counter.total
    return found


@pytest.mark.case("T11")
def test_compiled_layers_still_keep_their_inputs_alone() -> None:
    (kept,) = launch_ranks(kept_by_mode, 1).values
    assert kept["full"] < kept["none"] / 3
    assert kept["none"] / 3 < kept["selective"] < kept["none"]


def train_variants(variants: list[tuple[dict[str, Any], dict[str, Any], bool]]) -> list[list[float]]:
    """A rank: variant by variant from what the one before saved, compiled or not; the losses of its two steps."""
    compile_front_half()
    world = world_from_env()
    data, model = load("training_curve")
    start = model.state_dict()
    mine = slice(4 * world.rank, 4 * world.rank + 4)
    losses: list[list[float]] = []
    states = {"model/" + n: t for n, t in start.items() if n != "var"}
    with process_group(world, torch.device("cpu"), 60):
        for mode, parallel, compiled in variants:
            torch._dynamo.reset()
            counters.clear()
            config = training_config(
                model.config, parallel=parallel, activation_checkpoint=mode, compile={"enable": compiled}
            )
            backend = make_backend(config, torch.device("cpu"), world, plan_batch(8, world.size, 0))
            state = backend.state()
            for name, value in states.items():
                place(state[name], value)
            backend.load(state)
            losses.append([])
            for k in range(2):
                loss = backend.forward_backward(data["x"][k][mine], data["y"][k][mine], 1.0, True)[0]
                losses[-1].append(float(loss))
                backend.optimizer_step(0.0)
            graphs = counters["stats"]["unique_graphs"]
            assert bool(graphs) == compiled, (mode, parallel, dict(counters["stats"]))
            assert graphs <= (2 if "offload" in mode else 1), (mode, parallel, dict(counters["stats"]))
            states = {n: whole(t).clone() for n, t in backend.state().items() if n.startswith("model/")}
            assert list(states) == ["model/" + n for n in start if n != "var"]
    return losses


@pytest.mark.case("T11")
def test_two_ranks_train_compiled_and_plain_alike_and_exchange_weights() -> None:
    variants = [
        (MODES[mode], {"backend": backend}, compiled)
        for mode, backend in (("none", "ddp"), ("full", "fsdp2"), ("selective", "fsdp2"), ("offload", "fsdp2"))
        for compiled in (False, True)
    ]
    answers = launch_ranks(train_variants, 2, variants).values
    assert len(answers) == 2
    for found in answers:
        assert len(found) == len(variants)
        for other in found[1:]:
            assert other == pytest.approx(found[0], rel=1e-4)
