"""All blocks iterated at once: on trained weights, and with rows that an iteration does not survive."""

import re
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.sampling import trained
from tarflow.models.flow import TarFlow
from tarflow.models.sampling.engine import EagerBlock
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.inverse import Sampled, invert
from tarflow.models.sampling.joint import Stack
from tarflow.models.sampling.paths import JOINT, WHOLE, Path
from tarflow.models.sampling.plan import BlockPlan, SamplingPlan
from tarflow.models.sampling.settings import SamplingSettings
from tests.helpers.flows import config, noise, perturbed

Y = torch.tensor([0, 1, 3, -1, 2])
GUIDED = SamplingSettings(guidance=2.0)


@cache
def learned() -> TarFlow:
    """Weights after some steps of training: 3 blocks, 16 tokens."""
    return trained(config(), 60)


def sampled(
    model: TarFlow, path: Path, z: torch.Tensor, settings: SamplingSettings = GUIDED, every: bool = True
) -> Sampled:
    blocks = [BlockPlan(path=path.kind)] * model.config.num_blocks
    return invert(model, z, Y[: len(z)], settings, SamplingPlan(blocks=blocks), torch.full((len(z),), every))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"guidance": 2.0},
    {"guidance": 2.0, "attn_temp": 0.5, "guidance_form": "closed"},
    {"guidance": 2.0, "guide_blocks": (-1, 0), "attn_temp": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_a_stack_of_blocks_computes_what_each_of_them_computes(settings: dict[str, Any]) -> None:
    model = perturbed(config())
    blocks: list[Any] = list(model.blocks)[::-1]
    guidances = [Guidance.of_block(SamplingSettings(**settings), number, 3, 16) for number in (2, 1, 0)]
    x = torch.stack([noise(5, seed=seed) for seed in range(3)])
    stack = Stack(blocks, Y, 5, guidances)
    rows = torch.tensor([0, 3, 4])
    for y, some in ((Y, x), (Y[rows], x[:, rows])):
        if len(y) < 5:
            stack.keep(rows)
        found = stack.scales_and_shifts(some)
        for number, (block, guidance) in enumerate(zip(blocks, guidances)):
            engine = EagerBlock(block, y, len(y), guidance)
            for ours, theirs in zip(found, engine.tokens(some[number], 0, 15)):
                torch.testing.assert_close(ours[number], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_on_trained_weights_it_is_exact_in_fewer_passes_than_block_by_block(settings: dict[str, Any]) -> None:
    chosen, z = SamplingSettings(**settings), noise(5)
    exact, found, by_block = (sampled(learned(), path, z, chosen) for path in (Path("sequential"), JOINT, WHOLE))
    assert (found.images - exact.images).abs().max() <= 1e-4
    assert (found.certificate <= 1e-4).all()
    assert not found.redone.any()
    assert (found.passes == found.passes[:, :1]).all(), "a pass is one of all blocks"
    assert (found.passes[:, 0] < by_block.passes.sum(1)).all()
    assert (found.passes[:, 0] >= by_block.passes.max(1).values - 1).all(), "and it had something to iterate on"


@pytest.mark.case("S03")
@pytest.mark.case("S11")
def test_rows_that_do_not_converge_are_computed_again_and_the_others_are_left_as_they_are() -> None:
    model, z = learned(), noise(5)
    alone = sampled(model, JOINT, z)
    z[1] *= 40  # far from anything that it was trained on
    z[3, 2, 1] = torch.nan
    found = sampled(model, JOINT, z)
    good = [0, 2, 4]
    assert found.redone.all(1).tolist() == [False, True, False, True, False]
    assert (found.images - alone.images)[good].abs().max() <= 2e-5
    rows = [1, 3]  # together, as they were computed again: so far out, rounding by the size of a batch is amplified
    apart = invert(model, z[rows], Y[rows], GUIDED, SamplingPlan(blocks=[BlockPlan()] * 3), torch.tensor([True, True]))
    torch.testing.assert_close(found.images[rows], apart.images, rtol=0, atol=0, equal_nan=True)
    assert torch.isnan(found.certificate[3]).any()
    assert (found.certificate[good] <= 1e-4).all()


def test_samples_that_are_there_leave() -> None:
    passes = sampled(learned(), JOINT, noise(5)).passes[:, 0].tolist()
    assert len(set(passes)) > 1
    assert max(passes) < 3 * 15, "less than token by token"


def test_with_a_certificate_above_the_tolerance_a_sample_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack that computes something else is found by the check in torch of those samples that are checked."""
    honest = Stack.scales_and_shifts

    def wrong(self: Stack, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = honest(self, x)
        return a, b + 1e-2

    z = noise(5)
    exact = sampled(learned(), Path("sequential"), z)
    monkeypatch.setattr(Stack, "scales_and_shifts", wrong)
    found = sampled(learned(), JOINT, z)
    assert found.redone.all()
    assert (found.images - exact.images).abs().max() <= 2e-5
    assert not sampled(learned(), JOINT, z, every=False).redone.any(), "nobody looked"


def test_a_single_token_and_blocks_of_different_kinds() -> None:
    one = perturbed(config(patch_size=8))
    z = noise(2, one.config)
    images = [sampled(one, path, z).images for path in (JOINT, Path("sequential"))]
    assert torch.equal(*images)
    with pytest.raises(ValueError, match=re.escape("block 1 is inverted by itself, and block 0 with all others")):
        SamplingPlan(blocks=[BlockPlan(path="joint"), BlockPlan()])
