"""A model's numbers have bounds, each alone and their products too: nobody builds what they describe before they are checked."""

import re
import time
from typing import Any

import pytest
from pydantic import ValidationError

from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import flops_per_image, parameters
from tarflow.models.presets import preset, preset_names

SMALL: dict[str, Any] = {"image_size": 16, "patch_size": 4, "channels": 64, "num_blocks": 2, "layers_per_block": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_blocks": 2_000_000_000}, "num_blocks"),
        ({"head_channels": 10**18}, "head_channels"),
        ({"patch_size": 10**12}, "patch_size"),
        ({"num_classes": "3e11"}, "num_classes"),
        ({"num_classes": "9" * 5000}, "whole number"),
        ({"soft_clip": 1e300}, "soft_clip"),
        ({"soft_clip": 1e-300}, "soft_clip=1e-300 must be 0"),
        ({"soft_clip": "nan"}, "soft_clip"),
        ({"noise_conditioning": True, "nvp": False}, "model.noise_conditioning=true needs model.nvp=true"),
        ({"scale": "softplus", "nvp": False}, "model.scale=softplus needs model.nvp=true"),
        ({"positions": "rotary", "head_channels": 2}, "model.head_channels=2 must be a multiple of 4"),
        # Each number alone is allowed.
        ({"image_size": 1 << 14, "patch_size": 1}, "268,435,456 tokens, more than 65,536"),
        ({"num_blocks": 1024, "layers_per_block": 1024}, "1,048,576 layers in total, more than 4,096"),
        ({"channels": 1 << 16, "num_blocks": 512, "layers_per_block": 8}, "parameters"),
        ({"layers_per_block": [2, 2, 2]}, "layers_per_block lists 3 blocks, and model.num_blocks=2"),
        ({"layers_per_block": []}, "layers_per_block lists 0 blocks, and model.num_blocks=2"),
        ({"layers_per_block": [2, 0]}, "greater than 0"),
        ({"num_blocks": 5, "layers_per_block": [1024] * 5}, "5,120 layers in total, more than 4,096"),
        ({"channels": 1 << 16, "num_classes": 1 << 24}, "parameters, more than 1,099,511,627,776"),
        ({"image_size": 1 << 14, "patch_size": 1 << 14, "channels": 1 << 12}, "parameters"),
    ],
)
@pytest.mark.case("H10")
def test_numbers_of_a_model_and_their_products_are_bounded(change: dict[str, Any], said: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValidationError, match=said):
        TarFlowConfig.model_validate(SMALL | change)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("given", "size", "grid"), [([16, 24], (16, 24), (4, 6)), (("24", "8"), (24, 8), (6, 2)), ([16, "16"], 16, (4, 4))]
)
def test_a_rectangle_is_height_and_width_and_with_equal_sides_a_square(
    given: Any, size: object, grid: tuple[int, int]
) -> None:
    config = TarFlowConfig.model_validate(SMALL | {"image_size": given})
    assert (config.image_size, config.grid, config.num_tokens) == (size, grid, grid[0] * grid[1])
    assert config.image_shape == (3, 4 * grid[0], 4 * grid[1])
    assert TarFlowConfig.model_validate_json(config.model_dump_json()) == config
    assert flops_per_image(config) / config.num_tokens == pytest.approx(
        flops_per_image(TarFlowConfig.model_validate(SMALL | {"image_size": [4, 4 * grid[0] * grid[1]]}))
        / config.num_tokens
    )  # the cost is that of its tokens, however they lie


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([16], "two sides"),
        ([16, 16, 16], "two sides"),
        ([16, 0], "greater than 0"),
        ([16, 1 << 15], "less than or equal to 16384"),
        ([16, "x"], "whole number"),
        ("16,24", "in brackets"),
        ([16, 18], r"image_size=\[16, 18\] is not divisible by model.patch_size=4; patch sizes that divide it: 1, 2$"),
        ([1 << 14, 128], "131,072 tokens, more than"),
    ],
)
def test_what_is_no_size_is_said(given: Any, said: str) -> None:
    with pytest.raises(ValidationError) as error:
        TarFlowConfig.model_validate(SMALL | {"image_size": given})
    assert re.search(said, error.value.errors()[0]["msg"])


@pytest.mark.case("H10")
def test_no_published_model_comes_near_the_bounds() -> None:
    assert all(100 * parameters(preset(name)) < 1 << 40 for name in preset_names())


def test_layers_of_a_block_are_a_number_or_one_for_each_block() -> None:
    deep = TarFlowConfig.model_validate(SMALL | {"layers_per_block": ["2", 4]})
    assert deep.layers == deep.layers_per_block == (2, 4)
    assert TarFlowConfig.model_validate_json(deep.model_dump_json()) == deep
    alike = TarFlowConfig.model_validate(SMALL | {"layers_per_block": [2, 2]})
    assert alike == TarFlowConfig.model_validate(SMALL)  # one model, spelt in one way
    assert alike.model_dump()["layers_per_block"] == 2
    assert alike.layers == (2, 2)
