"""Method auto chooses what is fastest here: shown with engines whose calls cost what the test says, on a clock of its own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tarflow.models.sampling import joint, measure
from tarflow.models.sampling.engine import EagerBlock
from tarflow.models.sampling.inverse import invert
from tarflow.models.sampling.joint import Stack
from tarflow.models.sampling.measure import measure_plan
from tarflow.models.sampling.plan import SamplingPlan
from tarflow.models.sampling.sequential import sample
from tarflow.models.sampling.settings import SamplingSettings
from tests.helpers.flows import config, noise, perturbed

Y = torch.tensor([0, 1, 3, -1])
AUTO = SamplingSettings(guidance=1.5, method="auto")


class Clock:
    """Engines whose calls take `call` seconds, and `token` seconds for each token of each sample."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, costs: dict[str, tuple[float, float]]) -> None:
        self.now = 0.0
        self.held_up: list[float] = []  # seconds that the next sequential inversions lose to a neighbour
        clock = self

        class Costed(EagerBlock):
            name = ""

            def tokens(self, x: torch.Tensor, first: Any, count: int) -> Any:
                call, token = costs[self.name]
                clock.now += call + token * count * len(x)
                return super().tokens(x, first, count)

            def invert(self, x: torch.Tensor) -> None:
                call, token = costs[self.name]
                clock.now += (x.shape[1] - 1) * (call + token * len(x)) + (clock.held_up.pop() if clock.held_up else 0)
                super().invert(x)

        def make(name: str, *given: Any) -> EagerBlock:
            engine = Costed(*given)
            engine.name = name
            return engine

        class CostedStack(Stack):
            def scales_and_shifts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                call, token = costs.get("joint", (1e9, 1e9))
                clock.now += call + token * x.shape[:3].numel()
                return super().scales_and_shifts(x)

        for module in (measure, joint):
            monkeypatch.setattr(module, "Stack", CostedStack)
        monkeypatch.setattr(measure, "make_engine", make)
        monkeypatch.setattr(measure.native, "why_not", lambda _: None if "native" in costs else "not here")
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: self.now))


def chosen(plan: SamplingPlan) -> set[tuple[str, str]]:
    return {(block.engine, block.path) for block in plan.blocks}


def test_where_calls_cost_most_it_iterates_and_where_tokens_do_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perturbed(config())
    for costs, expected in [
        ({"eager": (1.0, 1e-6)}, {("eager", "whole")}),
        ({"eager": (1e-6, 1.0)}, {("eager", "sequential")}),
        ({"eager": (1e-6, 1.0), "native": (1e-6, 0.3)}, {("native", "sequential")}),
        ({"eager": (0.1, 1e-6), "native": (1e-6, 0.3)}, {("eager", "whole")}),
        ({"eager": (1.0, 1e-6), "joint": (1.0, 1e-6)}, {("eager", "joint")}),
        ({"eager": (1.0, 1e-6), "joint": (1.0, 1.0)}, {("eager", "whole")}),
    ]:
        Clock(monkeypatch, costs)
        plan = measure_plan(model, noise(4), Y, AUTO)
        assert chosen(plan) == expected, costs


def test_for_torch_alone_the_compiled_engine_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, {"eager": (1e-6, 1.0), "native": (1e-6, 0.3)})
    plan = measure_plan(perturbed(config()), noise(4), Y, AUTO, compiled=False)
    assert chosen(plan) == {("eager", "sequential")}
    assert all(name.startswith("eager ") for block in plan.blocks for name in block.seconds)


def test_a_neighbour_who_held_one_of_them_up_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, {"eager": (1.0, 0.5)})
    quiet = measure_plan(perturbed(config()), noise(4), Y, AUTO)
    assert chosen(quiet) == {("eager", "sequential")}
    clock.held_up = [1e6]
    plan = measure_plan(perturbed(config()), noise(4), Y, AUTO)
    assert len(plan.blocks[-1].seconds) > 1, "another one seemed faster"
    assert chosen(plan) == {("eager", "sequential")}
    assert plan.blocks[-1].seconds["eager sequential"] == quiet.blocks[-1].seconds["eager sequential"]


def test_the_plan_is_the_fastest_of_all_that_were_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perturbed(config(), size=0.06, outputs=0.03)
    for call in (0.03, 0.1, 0.3, 1.0):
        Clock(monkeypatch, {"eager": (call, 0.01), "native": (call / 2, 0.02)})
        for block in measure_plan(model, noise(4), Y, AUTO).blocks:
            assert block.seconds[str(block)] == min(block.seconds.values())
            assert block.passes.keys() == block.seconds.keys()


def test_a_candidate_that_cannot_win_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, {"eager": (0.0, 1.0)})
    for block in measure_plan(perturbed(config()), noise(4), Y, AUTO).blocks:
        assert block.seconds.keys() == {"eager sequential"}


def test_a_path_that_is_not_proven_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast it is: on these weights iterations fail."""
    Clock(monkeypatch, {"eager": (1.0, 1e-9), "joint": (1e-9, 1e-9)})
    model = perturbed(config(), size=0.06, outputs=0.05)
    plan = measure_plan(model, noise(4), Y[:4], SamplingSettings(method="auto"))
    certain = invert(model, noise(4), Y, SamplingSettings(method="auto"), plan)
    assert not certain.redone.any()


def test_what_auto_samples_is_what_sequential_samples() -> None:
    model = perturbed(config(), size=0.06, outputs=0.03)
    exact = sample(model, noise(4), Y, SamplingSettings(guidance=1.5))
    assert (sample(model, noise(4), Y, AUTO) - exact).abs().max() <= 1e-4


def test_a_model_of_one_token_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perturbed(config(patch_size=8))
    z = noise(4, model.config)
    Clock(monkeypatch, {"eager": (1.0, 1.0)})
    for method in ("auto", "fixed_point"):
        settings = SamplingSettings(method=method, guidance=1.5)
        assert torch.equal(sample(model, z, Y, settings), sample(model, z, Y, SamplingSettings(guidance=1.5)))
