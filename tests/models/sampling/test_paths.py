"""Every path ends at the sequential sample, each sample by itself, and says how far from it it may be."""

from typing import Any

import pytest
import torch

from tarflow.models.flow import TarFlow
from tarflow.models.sampling import inverse
from tarflow.models.sampling.engine import EagerBlock
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.inverse import invert
from tarflow.models.sampling.paths import JOINT, WHOLE, Path, certify, finite, follow, residual
from tarflow.models.sampling.plan import BlockPlan, SamplingPlan, plan_without_measuring
from tarflow.models.sampling.sequential import sample
from tarflow.models.sampling.settings import SamplingSettings
from tests.helpers.flows import config, noise, perturbed

Y = torch.tensor([0, 1, 3, -1, 2])
GUIDED = SamplingSettings(guidance=1.5)
PATHS = [WHOLE, JOINT, Path("window", 4), Path("window", 1), Path("window", 15), Path("window", 99)]
SEQUENTIAL_PLAN = SamplingPlan(blocks=[BlockPlan()] * 3)


def plan(path: Path, engine: str = "eager") -> SamplingPlan:
    return SamplingPlan(blocks=[BlockPlan(engine=engine, path=path.kind, width=path.width)] * 3)


def strong(nvp: bool = True, outputs: float = 0.03) -> TarFlow:
    """A flow whose tokens depend on each other enough for an iteration to take several passes."""
    return perturbed(config(nvp=nvp), size=0.06, outputs=outputs)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("settings", [SamplingSettings(), GUIDED, SamplingSettings(guidance=2, attn_temp=0.5,
                                                                                   guidance_form="closed")], ids=str)  # fmt: skip
def test_each_path_is_within_the_tolerance_of_sequential_and_certified(path: Path, settings: SamplingSettings) -> None:
    model = strong()
    found = invert(model, noise(5), Y, settings, plan(path))
    exact = sample(model, noise(5), Y, settings)
    assert (found.images - exact).abs().max() <= 1e-4
    assert (found.certificate <= 1e-4).all()
    assert not found.redone.any()
    if path == WHOLE:
        assert (found.passes <= 12).all(), "fewer than tokens: it has converged, and not been run to the end"
        assert (found.passes >= 3).all(), "and there was something to iterate on"
    if path.width == 1:
        assert (found.passes == 15).all()


@pytest.mark.parametrize("path", [WHOLE, JOINT, Path("window", 4)], ids=str)
@pytest.mark.case("S01")
def test_a_sample_is_the_same_in_any_batch(path: Path) -> None:
    model, z = strong(), noise(5)
    together = invert(model, z, Y, GUIDED, plan(path))
    for size in (1, 2):
        for start in range(0, 5, size):
            part = slice(start, start + size)
            alone = invert(model, z[part], Y[part], GUIDED, plan(path))
            assert (alone.images - together.images[part]).abs().max() <= 2e-5
            assert (alone.passes - together.passes[part]).abs().max() <= 1


def test_samples_leave_the_batch_at_their_own_pass() -> None:
    model, z = strong(), noise(5)
    z[2] = 0.01 * z[2]  # hardly anything to iterate on
    passes = invert(model, z, Y, GUIDED, plan(WHOLE)).passes
    assert (passes[2] < passes[[0, 1, 3, 4]].min(0).values).any()


class Counting(EagerBlock):
    """An engine that notes the samples and tokens of each call."""

    calls: list[tuple[int, int]]

    def tokens(self, x: torch.Tensor, first: int | torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append((len(x), count))
        return super().tokens(x, first, count)


@torch.no_grad()
def test_finished_samples_are_not_computed_any_more() -> None:
    block: Any = strong().blocks[1]
    z = noise(5)
    z[1:] *= torch.tensor([0.001, 0.01, 0.1, 1.0])[:, None, None]
    for path in (WHOLE, Path("window", 8)):
        engine = Counting(block, Y, 5, Guidance.of_block(GUIDED, 1, 3, 16))
        engine.calls = []
        found = follow(path, engine, z, 1e-4)
        sizes = [n for n, _ in engine.calls]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == 5
        assert sizes[-1] < 5
        assert sum(sizes) == int(found.passes.sum()), "each sample took part as often as it says"


@torch.no_grad()
def test_the_certificate_is_the_distance_of_the_noise() -> None:
    """The exact image of noise moved by d in one number has certificate d against the noise itself; in float64, to 1e-9."""
    model = strong().double()
    block: Any = model.blocks[1]
    for guided in (GUIDED, SamplingSettings()):
        z = noise(5).double()
        moved = z.clone()
        moved[:, 7, 3] += torch.tensor([0.0, 1e-5, -1e-3, 0.1, 0.0])
        guidance = Guidance.of_block(guided, 1, 3, 16)
        x = moved.clone()
        for i in range(15):
            a, b = exact_tokens(block, x, guidance)
            x[:, i + 1] = moved[:, i + 1] * torch.exp(a[:, i]) + b[:, i]
        a, b = exact_tokens(block, x, guidance)
        found = residual(x, z, a, b)
        assert found.tolist() == pytest.approx([0.0, 1e-5, 1e-3, 0.1, 0.0], abs=1e-8)


def exact_tokens(block: Any, x: torch.Tensor, guidance: Guidance) -> tuple[torch.Tensor, torch.Tensor]:
    """Guided (a, b) of all tokens but the first, in float64, from the flow's own forward pass."""
    halves = [block.double().attn_blocks and forward64(block, x, y) for y in ((Y, None) if guidance.active else (Y,))]
    a, b = (torch.cat(parts) for parts in zip(*halves))
    return guidance.apply(a, b, 0)


def forward64(block: Any, x: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    h = block.proj_in(x) + block.order(block.pos_embed, dim=0) + block.label_embedding(y, len(x))
    for layer in block.attn_blocks:
        h = layer(h)
    a, b = block.proj_out(h)[:, :-1].chunk(2, dim=-1)
    return a, b


def test_a_changed_sample_is_found_by_its_certificate() -> None:
    block: Any = strong().blocks[0]
    z = noise(5)
    engine = EagerBlock(block, Y, 5, Guidance.of_block(GUIDED, 0, 3, 16))
    x = z.clone()
    with torch.no_grad():
        engine.invert(x)
        x[3, 9, 2] += 1e-3
        found = certify(engine, x, z)
    assert found[3] >= 5e-4
    assert (found[[0, 1, 2, 4]] <= 1e-5).all()


class TestAdversarial:
    """Weights and noise on which an iteration fails: exact all the same, or counted; and nothing spreads."""

    @pytest.mark.parametrize("path", [WHOLE, JOINT, Path("window", 8)], ids=str)
    @pytest.mark.case("S11")
    def test_scales_that_an_iteration_does_not_survive_are_sampled_token_by_token(self, path: Path) -> None:
        model = perturbed(config(), size=0.06, outputs=0.05)
        found = invert(
            model, noise(5), Y, SamplingSettings(tolerance=2e-5), plan(path)
        )  # the least that can be asked for
        exact = invert(model, noise(5), Y, SamplingSettings(), SEQUENTIAL_PLAN)
        finite = torch.isfinite(exact.images).flatten(1).all(1)
        assert finite.all()
        assert found.redone.any(), "these weights are meant to be too much for an iteration"
        scale = exact.images[finite].abs().max()
        assert (found.images - exact.images)[finite].abs().max() <= 1e-4 * max(float(scale), 1.0)

    @pytest.mark.parametrize("path", [WHOLE, JOINT, Path("window", 4)], ids=str)
    @pytest.mark.case("S03")
    def test_one_bad_row_changes_no_other(self, path: Path) -> None:
        model, z = strong(), noise(5)
        good = invert(model, z, Y, GUIDED, plan(path))
        for value in (torch.nan, torch.inf, 1e30):
            broken = z.clone()
            broken[2, 5] = value
            found = invert(model, broken, Y, GUIDED, plan(path))
            rest = [0, 1, 3, 4]
            assert (found.images[rest] - good.images[rest]).abs().max() <= 2e-5
            assert not found.redone[rest].any()
            assert found.redone[2].any(), "counted"
            assert not (found.certificate[2] <= 1e-4).all(), "and never certified"

    @pytest.mark.case("S03")
    def test_what_is_not_finite_is_not_finite_after_it_was_computed_again(self) -> None:
        model = strong()
        with torch.no_grad():
            bias: Any = model.blocks[1].proj_out.bias  # type: ignore[union-attr]
            bias[:12] = 200.0  # exp(200) overflows
        found = invert(model, noise(5), Y, GUIDED, plan(WHOLE))
        assert not torch.isfinite(found.images).any(dim=(1, 2, 3)).all()
        assert found.redone[:, 1].all()
        assert torch.isnan(found.certificate[:, 1]).all()


class Wrong(EagerBlock):
    """An engine that is a little off in every sample, and not finite in sample 3."""

    def invert(self, x: torch.Tensor) -> None:
        super().invert(x)
        x[:, 7] += 1e-3
        x[3] = torch.nan


def test_what_an_engine_got_wrong_is_computed_again_where_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its certificate, where it has one; what is not finite is seen without."""
    exact = sample(strong(), noise(5), Y, GUIDED)
    monkeypatch.setattr(inverse, "make_engine", lambda _, *given: Wrong(*given))
    certified = torch.tensor([True, False, True, False, False])
    compiled = SamplingPlan(blocks=[BlockPlan(engine="native")] * 3)
    found = invert(strong(), noise(5), Y, GUIDED, compiled, certified)
    assert found.redone.all(1).tolist() == [True, False, True, True, False]
    assert found.redone.any(1).tolist() == [True, False, True, True, False]
    assert (found.images - exact)[[0, 2, 3]].abs().max() <= 2e-5
    assert (found.certificate[certified] <= 1e-4).all()


def test_methods_without_measuring_are_plans() -> None:
    model = strong()
    assert plan_without_measuring(model.config, SamplingSettings()).blocks == SEQUENTIAL_PLAN.blocks
    fixed = SamplingSettings(method="fixed_point", guidance=1.5)
    assert str(plan_without_measuring(model.config, fixed)) == (
        "block 2 eager window 32, block 1 eager whole, block 0 eager whole"
    )
    assert (sample(model, noise(5), Y, fixed) - sample(model, noise(5), Y, GUIDED)).abs().max() <= 1e-4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_anywhere_makes_a_sample_not_finite(bad: float) -> None:
    x = torch.randn(5, 4, 3) * 1e30
    x[1, 0, 0] = x[2, 2, 1] = x[3, 3, 2] = bad
    x[3, 1, 0] = torch.inf  # beside another kind
    assert finite(x).tolist() == [True, False, False, False, True]


def test_certificates_are_computed_for_those_that_are_asked_for() -> None:
    certified = torch.tensor([True, False, False, True, False])
    found = invert(strong(), noise(5), Y, GUIDED, SEQUENTIAL_PLAN, certified)
    assert torch.equal(~torch.isnan(found.certificate), certified[:, None].expand(5, 3))
    assert (found.certificate[certified] <= 2e-5).all()
    assert (found.passes == 15).all()


def test_an_iteration_in_bfloat16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling.method=auto needs sampling.param_dtype=float32, got bfloat16"):
        SamplingSettings(method="auto", param_dtype="bfloat16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_on_a_gpu_each_path_is_within_the_tolerance_of_sequential(path: Path) -> None:
    """And a sample that is not finite is counted there, too."""
    model, z = strong().cuda(), noise(5).cuda()
    z[2, 5] = torch.nan
    rest = [0, 1, 3, 4]
    found = invert(model, z, Y.cuda(), GUIDED, plan(path))
    exact = invert(model, z, Y.cuda(), GUIDED, SEQUENTIAL_PLAN, torch.ones(5, dtype=torch.bool))
    assert (found.images - exact.images)[rest].abs().max() <= 1e-4
    assert (found.certificate[rest] <= 1e-4).all()
    assert found.redone[2].any()
    assert not found.redone[rest].any()
    auto = SamplingSettings(guidance=1.5, method="auto")
    assert (sample(model, z[rest], Y[rest].cuda(), auto) - exact.images[rest]).abs().max() <= 1e-4
