"""Blocks take over each other's memory, and nothing of what is in it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tarflow.models.sampling import inverse, native
from tarflow.models.sampling.inverse import invert
from tarflow.models.sampling.plan import BlockPlan, SamplingPlan
from tarflow.models.sampling.room import Room
from tarflow.models.sampling.settings import SamplingSettings
from tests.helpers.flows import config, noise, perturbed

Y = torch.tensor([0, 1, 3, -1])


class Worst(Room):
    """Its memory holds NaN, whoever asks."""

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        return super().take(shape, like).fill_(torch.nan)


@pytest.mark.parametrize("layers", [2, [1, 3, 2]], ids=str)
@pytest.mark.parametrize("path", [("sequential", 0), ("window", 3), ("whole", 0)], ids=lambda path: path[0])
@pytest.mark.parametrize("engine", ["eager", "native"])
def test_nothing_comes_over_from_the_block_before(
    engine: str, path: tuple[str, int], layers: int | list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perturbed(config(layers_per_block=layers))
    block: Any = model.blocks[0]
    if engine == "native" and (problem := native.why_not(block)):
        pytest.skip(problem)
    plan = SamplingPlan(blocks=[BlockPlan(engine=engine, path=path[0], width=path[1])] * 3)
    settings, every = SamplingSettings(guidance=1.5), torch.ones(4, dtype=torch.bool)
    alone = invert(model, noise(4), Y, settings, plan, every)
    monkeypatch.setattr(inverse, "Room", Worst)
    among = invert(model, noise(4), Y, settings, plan, every)
    assert torch.isfinite(among.images).all()
    assert torch.equal(among.images, alone.images)
    assert torch.equal(among.certificate, alone.certificate)
    assert torch.equal(among.redone, alone.redone)


def test_the_memory_is_the_same_from_block_to_block_and_grows_where_one_needs_more() -> None:
    room, like = Room(), torch.zeros(1)
    first = room.take((2, 3, 4), like)
    second = room.take((5, 2), like)
    assert second.shape == (5, 2)
    assert second.data_ptr() == first.data_ptr()
    assert room.take((5, 5), like).shape == (5, 5)
    assert room.take((2,), like.bfloat16()).dtype == torch.bfloat16
