"""Schedule, batch arithmetic, averages of the weights."""

import math
from types import SimpleNamespace

import pytest
import torch

from tarflow.trainer.batch import plan_batch
from tarflow.trainer.config.schema import OptimConfig
from tarflow.trainer.ema.ema import EMA, power_decay, power_of_width
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.schedule import learning_rate


@pytest.mark.case("T08")
def test_rate_is_a_function_of_images_seen_alone() -> None:
    optim = OptimConfig(lr=1e-3, final_lr=1e-5)
    rate = lambda seen: learning_rate(optim, seen, 100, 1000)  # noqa: E731
    assert rate(50) == pytest.approx(5e-4)
    assert rate(100) == 1e-3
    assert rate(550) == pytest.approx(1e-5 + (1e-3 - 1e-5) / 2)
    assert rate(1000) == pytest.approx(1e-5)
    assert rate(5000) == rate(1000)  # never rises again after the planned end
    assert learning_rate(optim, 550, 100, 1500) > rate(550)  # a longer run gets a new schedule, never a rate of zero
    assert learning_rate(optim, 10, 100, 50) == pytest.approx(1e-4)  # warm-up longer than the run


def test_batch_arithmetic_and_what_does_not_divide() -> None:
    plan = plan_batch(256, 8, 16)
    assert (plan.per_rank, plan.accumulation_steps) == (32, 2)
    assert str(plan) == "global batch 256 = 8 ranks x 2 micro-batches x 16 images"
    assert plan_batch(256, 8, 0).micro_batch_size == 32
    with pytest.raises(TrainerError, match="is not divisible by 3 ranks; sizes that are: 255 or 258"):
        plan_batch(256, 3, 0)
    with pytest.raises(TrainerError, match="sizes that do: 1, 2, 4, 8, 16, 32"):
        plan_batch(256, 8, 12)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2])
def test_power_profile_has_its_width(std: float) -> None:
    """The profile t^gamma on [0, 1], taken as a density, has standard deviation `std`."""
    gamma = power_of_width(std)
    moment = lambda k: (gamma + 1) / (gamma + 1 + k)  # noqa: E731
    assert math.sqrt(moment(2) - moment(1) ** 2) == pytest.approx(std, rel=1e-6)


def test_average_weighs_the_past_by_the_power_profile() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    ema = EMA(SimpleNamespace(locals=lambda: {"p": p}), (0.1,))
    values = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    for k, value in enumerate(values, 1):
        p.data.copy_(value)
        ema.update(8 * k, 8)
    gamma = power_of_width(0.1)
    edges = (torch.arange(201).double() / 200) ** (gamma + 1)  # integral of the density over each step
    expected = ((edges[1:] - edges[:-1])[:, None] * values.double()).sum(0)
    assert torch.allclose(ema.averages["ema-0.100"]["p"].double(), expected, atol=1e-6)
    assert torch.equal(p.data, values[-1])  # the live weights are never touched


def test_average_does_not_depend_on_the_batch_size() -> None:
    assert power_decay(0.1, 800, 8) * power_decay(0.1, 792, 8) == pytest.approx(power_decay(0.1, 800, 16))


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (
            {"image_size": 8, "patch_size": 2, "channels": 64, "num_blocks": 1, "layers_per_block": 1},
            ["k parameters, 16 tokens of 12 numbers", "1 rank, one process", "= 1 rank x 1 micro-batch x 1 image\n",
             "1 image = 1 step\n", " MiB per rank: weights 0.20, gradients 0.20, optimizer 0.41", " MFLOP per image", " MFLOP in all"],
        ),
        (
            {"image_size": 8, "patch_size": 8, "channels": 8, "head_channels": 8, "num_blocks": 1, "layers_per_block": 1},
            ["1 token of 192 numbers", " KiB per rank: weights "],
        ),
        ({"preset": "imagenet256-8-1280-8-8"}, ["1.29B parameters", " GiB per rank: weights ", " TFLOP per image"]),
    ],
)  # fmt: skip
@pytest.mark.case("N14")
def test_a_plan_counts_in_units_that_fit_and_in_whole_words(model: dict[str, object], parts: list[str]) -> None:
    from tarflow.trainer.config.files import parse_config
    from tarflow.trainer.plan import describe

    train = {"global_batch_size": 1, "max_images": 1}
    text = describe(parse_config({"data": {"train": "x"}, "model": model, "train": train}, "test"))
    assert [part for part in parts if part not in text] == [], text
    assert "0.00 GiB" not in text
    assert "1 ranks" not in text


@pytest.mark.case("N14")
def test_a_last_step_that_is_not_full_counts() -> None:
    from tarflow.trainer.config.files import parse_config
    from tarflow.trainer.plan import describe

    model = {"image_size": 8, "patch_size": 2, "channels": 64, "num_blocks": 1, "layers_per_block": 1}
    config = parse_config(
        {"data": {"train": "x"}, "model": model, "train": {"global_batch_size": 64, "max_images": 3}}, "test"
    )
    assert "3 images = 1 step\n" in describe(config)
