"""A flow that is told the noise level: its embedding, its density, its inverse by every path, what it costs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.activation_checkpointing import KeptBytes
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import activation_bytes, flops_per_image, parameters
from tarflow.models.errors import ModelError
from tarflow.models.flow import TarFlow, flow_loss
from tarflow.models.noise import NoiseEmbedding, loss_weight, noise_levels, sinusoids
from tarflow.models.presets import preset
from tarflow.models.sampling import native
from tarflow.models.sampling.inverse import invert
from tarflow.models.sampling.paths import JOINT, SEQUENTIAL, WHOLE
from tarflow.models.sampling.paths import Path as Way
from tarflow.models.sampling.plan import BlockPlan, SamplingPlan
from tarflow.models.sampling.settings import SamplingSettings
from tarflow.models.weights import load_weights_file, save_weights_file
from tests.helpers.flows import config, noise, perturbed

ON = {"noise_conditioning": True, "input_scale": 1.5}
# With every other option of the architecture, and blocks of unequal depth.
RECIPE: dict[str, Any] = {"layers_per_block": (1, 2, 3), "scale": "softplus", "positions": "rotary", "qk_norm": True}
T = torch.tensor([0.05, 0.3, 0.7])
Y = torch.tensor([0, 3, -1])


def told(**changes: Any) -> TarFlow:
    """A model away from the identity, whose blocks depend on the noise level."""
    return perturbed(config(**(ON | changes)), outputs=0.02)


@torch.no_grad()
def test_the_embedding_is_its_formula() -> None:
    embed, t = NoiseEmbedding(12).double(), T.double()
    sines = [[math.sin(math.log(x) * 10_000 ** (-k / 6)) for k in range(6)] for x in t.tolist()]
    cosines = [[math.cos(math.log(x) * 10_000 ** (-k / 6)) for k in range(6)] for x in t.tolist()]
    expected = torch.cat([torch.tensor(part, dtype=torch.float64) for part in (sines, cosines)], 1)
    torch.testing.assert_close(sinusoids(t, 12), expected, rtol=0, atol=1e-14)
    first, last = (embed.main[i] for i in (0, 2))
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    hidden = expected @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(embed(t)[:, 0], hidden @ last.weight.T + last.bias, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_neighbouring_levels_differ_also_where_weights_are_bfloat16_or_autocast() -> None:
    embed, near = NoiseEmbedding(64), torch.tensor([0.3, 0.3003])
    exact = embed(near)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embed(near), exact)
    rounded = embed.to(torch.bfloat16)(near)
    assert rounded.dtype == torch.float32
    change = (exact[1] - exact[0]).norm()
    assert (rounded[1] - rounded[0] - (exact[1] - exact[0])).norm() < 0.05 * change


def test_levels_have_the_distribution_that_is_asked_for() -> None:
    u, bounds = torch.linspace(0, 1, 100_001), (0.01, 0.7)
    uniform, squared, normal = (
        noise_levels(u, bounds, kind, (-1.2, 1.0)).double() for kind in ("uniform", "squared_uniform", "log_normal")
    )
    for t in (uniform, squared, normal):
        assert [float(t[0]), float(t[-1])] == pytest.approx([0.01, 0.7])
        assert (t.diff() >= 0).all()
    assert uniform.mean() == pytest.approx(0.355, abs=1e-4)
    assert squared.square().mean() == pytest.approx((0.01**2 + 0.7**2) / 2, abs=1e-4)
    # A normal's mean between two bounds: mu + (phi(a) - phi(b)) / (Phi(b) - Phi(a)), of log t.
    a, b = ((math.log(t) + 1.2) for t in bounds)
    phi, ndtr = (
        (lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)),
        (lambda x: 0.5 * math.erfc(-x / math.sqrt(2))),
    )
    assert normal.log().mean() == pytest.approx(-1.2 + (phi(a) - phi(b)) / (ndtr(b) - ndtr(a)), abs=1e-3)
    assert [loss_weight(T.double()[1:2], kind).item() for kind in ("none", "level", "level_squared")] == pytest.approx(
        [1, 0.3, 0.09], rel=1e-6
    )


@pytest.mark.parametrize(
    "log_normal", [(0.5, 0.2), (3.0, 0.5), (-8.0, 0.4), (4.0, 0.2), (-9.0, 0.2), (2.0, 1.0), (-3.0, 5.0)]
)
def test_levels_far_from_the_middle_of_a_log_normal_hug_the_end_beside_it(log_normal: tuple[float, float]) -> None:
    """The quantiles of a truncated normal by SciPy, which counts in logarithms."""
    u, bounds = torch.linspace(0, 0.999, 50), (0.01, 0.3)
    found = noise_levels(u, bounds, "log_normal", log_normal)
    mean, std = log_normal
    ends = [(math.log(end) - mean) / std for end in bounds]
    expected = np.exp(scipy.stats.truncnorm.ppf(u.double().numpy(), *ends, loc=mean, scale=std))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (found.diff() >= 0).all()
    assert found.min() < found.max()


def test_logdet_is_the_jacobians_with_the_input_scale() -> None:
    model = told(image_size=2, patch_size=1, in_channels=1, num_classes=0)
    x, t = torch.randn(4, generator=torch.Generator().manual_seed(0)), T[1:2]
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v.view(1, 1, 2, 2), noise=t)[0].flatten(), x)
    logdet = model(x.view(1, 1, 2, 2), noise=t)[1]
    assert 4 * logdet.item() == pytest.approx(torch.linalg.slogdet(jacobian.double())[1].item(), abs=1e-4)
    assert logdet.item() != pytest.approx(model(x.view(1, 1, 2, 2), noise=T[2:])[1].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("engine", "path"), [("eager", SEQUENTIAL), ("eager", Way("window", 4)), ("eager", WHOLE), ("eager", JOINT),
                         ("native", SEQUENTIAL), ("native", WHOLE)], ids=str,
)  # fmt: skip
@torch.no_grad()
def test_round_trip_by_every_path_at_the_level_that_the_settings_name(engine: str, path: Way) -> None:
    model, z = told(**RECIPE), noise(3)
    block: Any = model.blocks[0]
    if engine == "native" and (problem := native.why_not(block)):
        pytest.skip(problem)
    plan = SamplingPlan(blocks=[BlockPlan(engine=engine, path=path.kind, width=path.width)] * 3)
    settings = SamplingSettings(noise_level=0.3, certify_every=1)
    done = invert(model, z, Y, settings, plan, torch.ones(3, dtype=torch.bool))
    assert not done.redone.any()
    assert (done.certificate <= 1e-4).all()
    again, _ = model(done.images, Y, noise=torch.full((3,), 0.3))
    assert (again - z).abs().max() <= 1e-4
    elsewhere, _ = model(done.images, Y, noise=torch.full((3,), 0.1))
    assert (elsewhere - z).abs().max() > 1e-3
    # Guided, both halves are told the level: weight 2 on equal halves changes nothing.
    guided = SamplingSettings(noise_level=0.3, guidance=2.0)
    none = torch.full((3,), -1)
    plain = invert(model, z, none, settings, plan).images
    torch.testing.assert_close(invert(model, z, none, guided, plan).images, plain, rtol=1e-3, atol=1e-3)


def test_a_level_that_is_missing_or_has_no_meaning_is_an_error() -> None:
    with pytest.raises(ModelError, match="has to be told the noise level"):
        told()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ModelError, match=r"without model\.noise_conditioning"):
        perturbed(config())(torch.zeros(1, 3, 8, 8), noise=T[:1])
    with pytest.raises(ModelError, match="has to be told"):
        invert(told(), noise(1), None, SamplingSettings(), SamplingPlan(blocks=[BlockPlan()] * 3))
    with pytest.raises(ValueError, match=r"even model\.channels"):
        config(noise_conditioning=True, channels=45, head_channels=15)


@pytest.mark.parametrize(("size", "millions"), [(64, 771), (128, 1203), (256, 2221)])
def test_the_presets_are_told_it_and_have_their_depth_in_the_last_block(size: int, millions: int) -> None:
    model = preset(f"imagenet{size}-iterative")
    assert model.noise_conditioning
    assert model.layers == (4, 4, 4, 24)
    assert round(parameters(model) / 1e6) == millions


def test_a_weights_file_knows_it(tmp_path: Path) -> None:
    model = told()
    for name in ("model.safetensors", "model.pth"):
        save_weights_file(tmp_path / name, model.config, model.state_dict())
        read, tensors = load_weights_file(tmp_path / name)
        assert read == model.config
        assert read.input_scale == 1.5
        assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())


def kept_bytes(shape: TarFlowConfig, noise: torch.Tensor | None) -> int:
    """What autograd keeps for the backward pass of one image, weights apart."""
    model = TarFlow(shape)
    with (counter := KeptBytes(model)):
        loss = flow_loss(*model(torch.randn(1, *shape.image_shape), noise=noise)).mean()
    del loss
    return counter.total


def test_the_cost_model_counts_it() -> None:
    off = TarFlowConfig(image_size=16, patch_size=2, channels=64, num_blocks=2, layers_per_block=2)
    on = off.model_copy(update={"noise_conditioning": True})
    assert parameters(on) == sum(p.numel() for p in TarFlow(on).parameters()) > parameters(off)
    bytes_on, bytes_off = kept_bytes(on, T[:1]), kept_bytes(off, None)
    assert bytes_on == pytest.approx(activation_bytes(on, element=4), rel=0.1)
    more = activation_bytes(on, element=4) - activation_bytes(off, element=4)
    assert bytes_on - bytes_off == pytest.approx(more, rel=0.1)
    with FlopCounterMode(display=False) as counter:
        TarFlow(on)(torch.randn(1, *on.image_shape), noise=T[:1])
        total = counter.get_total_flops()
        TarFlow(off)(torch.randn(1, *on.image_shape))
    more = flops_per_image(on, training=False) - flops_per_image(off, training=False)
    assert total == pytest.approx(flops_per_image(on, training=False), rel=0.1)
    assert total - (counter.get_total_flops() - total) == pytest.approx(more, rel=0.1)
