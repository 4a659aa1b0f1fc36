"""The engine for CUDA takes steps that could be recorded: nothing in them looks at a number, and they are torch's own."""

from typing import Any

import pytest
import torch

from tarflow.models.sampling import graphed, inverse
from tarflow.models.sampling.engine import EagerBlock
from tarflow.models.sampling.graphed import GraphedBlock
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.inverse import invert, make_engine
from tarflow.models.sampling.measure import measure_plan
from tarflow.models.sampling.plan import BlockPlan, SamplingPlan
from tarflow.models.sampling.settings import SamplingSettings
from tests.helpers.flows import config, noise, perturbed

Y = torch.tensor([0, 1, 3, -1])
MODELS: list[dict[str, Any]] = [
    {}, {"positions": "rotary"}, {"qk_norm": True}, {"scale": "softplus"}, {"num_classes": 0}, {"soft_clip": 1.0},
    {"nvp": False}, {"layers_per_block": [1, 3, 2]}, {"noise_conditioning": True}, {"image_size": [8, 16]},
    {"image_size": 4}, {"image_size": 2},
]  # fmt: skip
SETTINGS = [
    SamplingSettings(),
    SamplingSettings(guidance=1.5),
    SamplingSettings(guidance=2.0, annealed=False, attn_temp=0.5, guidance_form="closed"),
    SamplingSettings(guidance=2.0, attn_temp=0.5, guidance_form="sigma", guide="b"),
]


def told(settings: SamplingSettings, changes: dict[str, Any]) -> SamplingSettings:
    """With a noise level, for a model that is told one."""
    level = {"noise_level": 0.2, "denoise_steps": 2} if changes.get("noise_conditioning") else {}
    return settings.model_copy(update=level)


@pytest.fixture(params=[5, 8, 64])
def _stretch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "STRETCH", request.param)


@pytest.mark.usefixtures("_stretch")
@pytest.mark.parametrize("changes", MODELS, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.guidance:g}-{s.guidance_form}")
@torch.no_grad()
def test_its_steps_invert_as_torch_token_by_token(changes: dict[str, Any], settings: SamplingSettings) -> None:
    model, settings = perturbed(config(**changes)), told(settings, changes)
    block: Any = model.blocks[1]
    z = torch.randn(4, model.config.num_tokens, model.config.token_dim, generator=torch.Generator().manual_seed(1))
    given = (
        block,
        Y if model.config.num_classes else None,
        4,
        Guidance.of_block(settings, 1, 3, model.config.num_tokens),
    )
    exact, found = z.clone(), z.clone()
    EagerBlock(*given).invert(exact)
    engine = GraphedBlock(*given)
    engine.cache.fill_(torch.nan)
    engine.invert(found)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    if (last := model.config.num_tokens - 2) >= 0:
        for ours, theirs in zip(engine.tokens(exact, 0, last + 1), EagerBlock(*given).tokens(exact, 0, last + 1)):
            assert torch.equal(ours, theirs)


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what a recording cannot hold: a number that comes to the host, and a tensor from there."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        self.calls.append(name)
        assert name not in (
            "aten::_local_scalar_dense",
            "aten::item",
            "aten::nonzero",
            "aten::lift_fresh",
            "aten::masked_select",
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", MODELS[:9], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.guidance:g}-{s.guidance_form}")
@torch.no_grad()
def test_a_step_asks_the_device_for_nothing_and_is_the_same_at_every_token(
    changes: dict[str, Any], settings: SamplingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = perturbed(config(**changes)), told(settings, changes)
    block: Any = model.blocks[1]
    labels = Y if model.config.num_classes else None
    engine = GraphedBlock(block, labels, 4, Guidance.of_block(settings, 1, 3, 16))
    steps: list[list[str]] = []

    def recorded(step: Any, _: torch.device) -> Any:
        def again() -> None:
            with Recorder() as calls:
                step()
            steps.append(calls.calls)

        return again

    monkeypatch.setattr(graphed, "recorded", recorded)
    engine.invert(noise(4))
    assert len(steps) == 14
    assert all(step == steps[0] for step in steps)


def test_where_there_is_no_gpu_torch_takes_its_place() -> None:
    model = perturbed(config())
    plan = SamplingPlan(blocks=[BlockPlan(engine="graphed")] * 3)
    settings = SamplingSettings(guidance=1.5)
    block: Any = model.blocks[0]
    assert type(make_engine("graphed", block, Y, 4, Guidance.of_block(settings, 0, 3, 16))) is EagerBlock
    exact = invert(model, noise(4), Y, settings, SamplingPlan(blocks=[BlockPlan()] * 3))
    assert torch.equal(invert(model, noise(4), Y, settings, plan).images, exact.images)


class Unrecordable(EagerBlock):
    def invert(self, x: torch.Tensor) -> None:
        super().invert(x)
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_plan_whose_steps_cannot_be_recorded_here_is_drawn_in_torch_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, settings = perturbed(config()), SamplingSettings(guidance=1.5)
    exact = invert(model, noise(4), Y, settings, SamplingPlan(blocks=[BlockPlan()] * 3))
    monkeypatch.setattr(inverse, "make_engine", lambda _, *given: Unrecordable(*given))
    found = invert(model, noise(4), Y, settings, SamplingPlan(blocks=[BlockPlan(engine="graphed")] * 3))
    assert found.redone.all()
    assert torch.equal(found.images, exact.images)
    with pytest.raises(RuntimeError, match="not permitted"):
        invert(model, noise(4), Y, settings, SamplingPlan(blocks=[BlockPlan(engine="native")] * 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.guidance:g}-{s.guidance_form}")
@torch.inference_mode()
def test_on_a_gpu_graphs_draw_what_torch_draws_and_a_plan_tries_them(settings: SamplingSettings) -> None:
    model, z, y = perturbed(config()).cuda(), noise(4).cuda(), Y.cuda()
    plan = SamplingPlan(blocks=[BlockPlan(engine="graphed")] * 3)
    every = torch.ones(4, dtype=torch.bool)
    exact = invert(model, z, y, settings, SamplingPlan(blocks=[BlockPlan()] * 3), every)
    for _ in range(2):
        found = invert(model, z, y, settings, plan, every)
        assert (found.images - exact.images).abs().max() <= 1e-4
        assert not found.redone.any()
    measured = measure_plan(model, z, y, settings)
    assert "no graphs" not in measured.machine
    assert all("graphed sequential" in block.seconds for block in measured.blocks)
