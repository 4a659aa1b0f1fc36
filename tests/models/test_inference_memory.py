"""The cost model's peaks of sampling, denoising and likelihood, against the bytes of every tensor that the real code makes."""

import copy
from typing import Any

import pytest
import torch

from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import denoising_bytes, likelihood_bytes, sampling_bytes
from tarflow.models.denoise import denoise
from tarflow.models.flow import TarFlow
from tarflow.models.likelihood import bits_per_dim
from tarflow.models.presets import preset
from tarflow.models.sampling.inverse import invert
from tarflow.models.sampling.plan import plan_without_measuring
from tarflow.models.sampling.settings import SamplingSettings
from tests.helpers.live_bytes import LiveBytes, per_image

IMAGENET64 = preset("imagenet64-2-768-8-8")
# Of few layers, since each takes its time to be followed; as many of both kinds would hide what goes by the one or the other.
SHAPES = {
    "imagenet64": IMAGENET64.model_copy(update={"num_blocks": 2, "layers_per_block": 5}),
    "few tokens, wide patches": TarFlowConfig(
        image_size=32, patch_size=8, channels=256, num_blocks=4, layers_per_block=3, num_classes=3
    ),
    "narrow layers": TarFlowConfig(
        image_size=32, patch_size=2, channels=256, expansion=2, num_blocks=2, layers_per_block=4, num_classes=3
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_denoising_takes_the_bytes_that_the_cost_model_says(shape: str) -> None:
    config = SHAPES[shape]
    counted = per_image(config, lambda model, x, y: denoise(model, x, y, 0.1))
    assert counted == pytest.approx(denoising_bytes(config), rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_likelihood_takes_the_bytes_that_the_cost_model_says(shape: str) -> None:
    config = SHAPES[shape]
    counted = per_image(config, torch.inference_mode()(bits_per_dim))
    assert counted == pytest.approx(likelihood_bytes(config), rel=0.03)


SAMPLED = TarFlowConfig(image_size=24, patch_size=4, channels=128, num_blocks=2, layers_per_block=4, num_classes=3)


@pytest.mark.parametrize("certified", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance": 1.5},
        {"guidance": 1.5, "attn_temp": 0.5, "param_dtype": "bfloat16"},
        {"method": "fixed_point"},
    ],
    ids=str,
)
def test_sampling_takes_the_bytes_that_the_cost_model_says(settings: dict[str, Any], certified: int) -> None:
    """With numbers, since sampling looks at them; so that the model is small."""
    sampling = SamplingSettings(**settings, certify_every=certified)
    judge = TarFlow(SAMPLED).eval().requires_grad_(False)
    fast = copy.deepcopy(judge).to(getattr(torch, sampling.param_dtype))
    plan = plan_without_measuring(SAMPLED, sampling)

    def peak(count: int) -> int:
        noise, labels = torch.zeros(count, SAMPLED.num_tokens, SAMPLED.token_dim), torch.zeros(count, dtype=torch.int64)
        chosen = torch.full((count,), bool(certified))
        with LiveBytes() as live:
            invert(fast, noise.clone(), labels, sampling, plan, chosen, judge)
        return live.peak

    assert (peak(6) - peak(2)) / 4 == pytest.approx(sampling_bytes(SAMPLED, **sampling.memory), rel=0.1)


def test_the_model_of_imagenet_64_agrees_with_what_a_gpu_used() -> None:
    """0.26 GB per image on an H200 (docs/gpu.md)."""
    assert denoising_bytes(IMAGENET64) == pytest.approx(0.26e9, rel=0.05)
