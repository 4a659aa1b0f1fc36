"""One call computes any number of tokens over the cache: the same (a, b) however the sequence is cut."""

from typing import Any

import pytest
import torch

from tarflow.models.sampling.engine import EagerBlock
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.sequential import sample
from tarflow.models.sampling.settings import SamplingSettings
from tests.helpers.flows import config, noise, perturbed

Y = torch.tensor([0, 1, 3, -1])
SETTINGS: list[dict[str, Any]] = [
    {"guidance": 0.0},
    {"guidance": 1.5},
    {"guidance": 2.0, "annealed": False, "attn_temp": 0.5, "guide": "a"},
    {"guidance": 2.0, "attn_temp": 0.5, "guidance_form": "closed"},
]


def an_engine(settings: dict[str, Any], n: int = 4, number: int = 1, **changes: Any) -> EagerBlock:
    model = perturbed(config(**changes))
    block: Any = model.blocks[number]
    return EagerBlock(block, Y[:n], n, Guidance.of_block(SamplingSettings(**settings), number, 3, 16))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("cut", [(15,), (1, 14), (4, 1, 7, 3), (14, 1)], ids=str)
@torch.no_grad()
def test_any_cut_of_the_sequence_gives_the_same(settings: dict[str, Any], cut: tuple[int, ...]) -> None:
    x = noise(4)
    engine = an_engine(settings)
    one_by_one = [engine.tokens(x, i, 1) for i in range(15)]
    engine, at, found = an_engine(settings), 0, []
    for count in cut:
        found.append(engine.tokens(x, at, count))
        at += count
    for ours, theirs in zip(zip(*found), zip(*one_by_one)):
        torch.testing.assert_close(torch.cat(ours, 1), torch.cat(theirs, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_samples_may_be_at_different_tokens_and_leave(settings: dict[str, Any]) -> None:
    x, engine = noise(4), an_engine(settings)
    a, b = engine.tokens(x, 0, 15)
    engine = an_engine(settings)
    engine.tokens(x, 0, 9)
    first = torch.tensor([9, 2, 5, 0])
    some = engine.tokens(x, first, 5)
    engine.keep(torch.tensor([0, 2]))
    fewer = engine.tokens(x[[0, 2]], torch.tensor([9, 5]), 5)
    for whole, part, kept in zip((a, b), some, fewer):
        expected = torch.stack([whole[s, i : i + 5] for s, i in enumerate(first.tolist())])
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kept, expected[[0, 2]], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_not_finite_stays_in_its_sample() -> None:
    x = noise(4)
    clean = an_engine(SETTINGS[1]).tokens(x, 0, 15)
    x[1, 3] = torch.nan
    engine = an_engine(SETTINGS[1])
    for part, whole in zip(engine.tokens(x, 0, 15), clean):
        assert torch.isnan(part[1, 3:]).any()
        assert torch.equal(part[[0, 2, 3]], whole[[0, 2, 3]])


@torch.no_grad()
def test_sampling_is_the_engine_token_by_token() -> None:
    model, z, settings = perturbed(config()), noise(4), SamplingSettings(guidance=1.5)
    x = z
    for number in (2, 1, 0):
        block: Any = model.blocks[number]
        x = block.order(x).clone()
        engine = EagerBlock(block, Y, 4, Guidance.of_block(settings, number, 3, 16))
        for i in range(15):
            a, b = engine.tokens(x, i, 1)
            x[:, i + 1] = x[:, i + 1] * torch.exp(a[:, 0]) + b[:, 0]
        x = block.order(x)
    assert torch.equal(model.unpatchify(x), sample(model, z, Y, settings))
