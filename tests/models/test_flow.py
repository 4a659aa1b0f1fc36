"""The flow inverts, its log-determinant is the Jacobian's, its likelihood counts bits."""

import math
from typing import Any

import pytest
import torch

from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import TarFlow, flow_loss, patchify, unpatchify
from tarflow.models.init import init_weights
from tarflow.models.likelihood import bits_from_nats, bits_per_dim, log_likelihood
from tarflow.models.noise import dequantize, to_model_range, to_pixels
from tarflow.models.sampling.guidance import Guidance
from tarflow.models.sampling.sequential import invert_block, sample
from tarflow.models.sampling.settings import SamplingSettings


def config(**changes: object) -> TarFlowConfig:
    settings: dict = {
        "image_size": 8, "patch_size": 2, "in_channels": 3, "channels": 64, "num_blocks": 3, "layers_per_block": 2,
        "num_classes": 4,
    }  # fmt: skip
    return TarFlowConfig(**(settings | changes))


def perturbed(model_config: TarFlowConfig, size: float = 0.05) -> TarFlow:
    """A model away from its initial identity, as training leaves it."""
    model = TarFlow(model_config)
    init_weights(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return model.eval()


def images(n: int, c: TarFlowConfig, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, *c.image_shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tokens(x: torch.Tensor, model: TarFlow, y: torch.Tensor | None) -> torch.Tensor:
    return model(x, y)[0] / model.var.sqrt()


def blocks(model: TarFlow) -> list[Any]:
    """The model's blocks, of whose parts mypy sees only modules."""
    return list(model.blocks)


def guidance(weight: float, **others: Any) -> SamplingSettings:
    return SamplingSettings(guidance=weight, **{"annealed": False} | others)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 6), (8, 2)])
def test_patches_are_channel_major_and_row_by_row(height: int, width: int) -> None:
    x = torch.arange(2 * 3 * height * width).float().view(2, 3, height, width)
    p, columns = patchify(x, 2), width // 2
    assert p.shape == (2, height // 2 * columns, 12)
    row, column = divmod(1, columns)
    assert torch.equal(p[0, 1], x[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten())
    assert torch.equal(unpatchify(p, 2, 3, (height // 2, columns)), x)


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.case("S11")
def test_image_to_latent_to_image(nvp: bool, classes: int, batch: int) -> None:
    model = perturbed(config(nvp=nvp, num_classes=classes))
    x = images(batch, model.config)
    y = torch.arange(batch) % 4 if classes else None
    with torch.no_grad():
        back = sample(model, tokens(x, model, y), y)
    assert (back - x).abs().max() <= 1e-4


@pytest.mark.case("S11")
def test_latent_to_image_to_latent() -> None:
    model = perturbed(config())
    z = torch.randn(3, 16, 12, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 3, -1])
    with torch.no_grad():
        again = model(sample(model, z, y), y)[0]
    assert (again - z).abs().max() <= 1e-4


@pytest.mark.case("S11")
def test_cached_inverse_equals_the_inverse_without_a_cache() -> None:
    model = perturbed(config(num_blocks=2))
    y = torch.tensor([1, -1])
    z = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(0))
    x = z
    with torch.no_grad():
        for block in reversed(blocks(model)):  # every token from a full forward pass over what is known so far
            x = block.order(x)
            known = x.clone()
            for i in range(known.shape[1]):
                a, b = block.scale_and_shift(known, y)
                known[:, i] = x[:, i] * torch.exp(a[:, i]) + b[:, i]
            x = block.order(known)
        cached = sample(model, z, y)
    assert (model.unpatchify(x) - cached).abs().max() <= 1e-5 * cached.abs().max()


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.case("S11")
def test_logdet_is_the_jacobians(nvp: bool) -> None:
    model = perturbed(config(image_size=2, patch_size=1, in_channels=1, num_classes=0, nvp=nvp), size=0.1).double()
    x = images(1, model.config).double()
    flat = lambda v: model(v.view(1, 1, 2, 2))[0].flatten()  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(flat, x.flatten())
    _, logabsdet = torch.linalg.slogdet(jacobian)
    _, logdet = model(x)
    logdet = logdet.detach()
    assert abs(float(logabsdet) - 4 * float(logdet)) <= 1e-4
    assert nvp == (abs(float(logdet)) > 1e-3)  # the affine flow's is not trivially zero, the shift's is


@pytest.mark.case("S11")
def test_uniform_images_have_exactly_eight_bits_under_a_uniform_density() -> None:
    """A density that is uniform on [-1, 1] says 8 bits for every 8-bit image; through the Gaussian prior by its CDF."""
    c = config(num_classes=0)
    pixels = torch.randint(0, 256, (64, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    u = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(1))
    x = dequantize(pixels, u).double()
    # z = Phi^-1((x + 1) / 2) turns the uniform density into the prior; dz/dx = 1 / (2 phi(z)).
    z = math.sqrt(2) * torch.erfinv(x.clamp(-1 + 1e-12, 1 - 1e-12))
    logdet = (0.5 * z.square() + 0.5 * math.log(2 * math.pi) - math.log(2)).flatten(1).mean(1)
    bits = bits_from_nats(flow_loss(patchify(z, c.patch_size), logdet))
    assert torch.allclose(bits, torch.full_like(bits, 8.0), atol=1e-3)


@pytest.mark.case("S11")
def test_identity_flow_says_eight_bits_of_uniform_noise_with_the_priors_width() -> None:
    """The identity flow's bits on uniform data are known in closed form: 0.5 E[x^2] / ln 2 + the constant."""
    model = TarFlow(config(num_classes=0))  # all weights of the last projection are zero ...
    init_weights(model, 0)
    with torch.no_grad():
        for block in blocks(model):
            block.proj_out.bias.zero_()  # ... and now its bias too: z = x
    pixels = torch.randint(0, 256, (512, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x = dequantize(pixels, torch.rand(pixels.shape, generator=torch.Generator().manual_seed(1)))
    expected = 0.5 * (1 / 3) / math.log(2) + 0.5 * math.log2(2 * math.pi) + 7
    with torch.no_grad():
        assert float(bits_per_dim(model, x).mean()) == pytest.approx(expected, abs=2e-3)


def test_bits_per_dim_agrees_with_the_loss_and_with_the_log_likelihood() -> None:
    model = perturbed(config())
    x, y = images(4, model.config), torch.tensor([0, 1, 2, -1])
    with torch.no_grad():
        z, logdet = model(x, y)
        bits = bits_per_dim(model, x, y)
        assert torch.allclose(bits, bits_from_nats(flow_loss(z, logdet)), atol=1e-5)
        assert torch.allclose(bits, 7 - log_likelihood(model, x, y) / (192 * math.log(2)), atol=1e-5)


def test_pixels_survive_the_round_trip_and_dequantisation_stays_in_its_cell() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_model_range(pixels)), pixels)
    for u in (0.0, 0.5, 0.9999):
        cell = ((dequantize(pixels, torch.full((256,), u)) + 1) / 2 * 256).floor()
        assert torch.equal(cell.to(torch.uint8), pixels)


@pytest.mark.case("S04")
def test_pixels_are_rounded_to_nearest_not_cut() -> None:
    k = torch.arange(256).float()
    for offset in (-0.49, 0.49):
        assert torch.equal(to_pixels((k + offset) / 127.5 - 1), k.to(torch.uint8))
    assert to_pixels(torch.tensor([1.3, -1.3])).tolist() == [255, 0]


def test_data_stay_float32_when_the_network_computes_in_bfloat16() -> None:
    model = perturbed(config()).to(torch.bfloat16)
    z, logdet = model(images(2, model.config), torch.tensor([0, 1]))
    assert z.dtype == logdet.dtype == torch.float32
    with torch.no_grad():  # and so a bfloat16 network is still inverted to float32 accuracy where its outputs repeat
        back = sample(model, z / model.var.float().sqrt(), torch.tensor([0, 1]))
    assert (back - images(2, model.config)).abs().max() < 0.05


@pytest.mark.case("S11")
def test_extreme_scales_stay_finite_with_the_soft_clip() -> None:
    for clip, finite in ((0.0, False), (4.0, True)):
        model = perturbed(config(soft_clip=clip), size=0.05)
        with torch.no_grad():
            for block in blocks(model):
                block.proj_out.bias[: block.proj_out.bias.numel() // 2] = 200.0
        out = sample(model, torch.ones(1, 16, 12), torch.tensor([0]))
        assert bool(torch.isfinite(out).all()) == finite


class TestGuidance:
    """What guidance means."""

    def setup_method(self) -> None:
        self.model = perturbed(config())
        self.noise = torch.randn(3, 16, 12, generator=torch.Generator().manual_seed(0))
        self.y = torch.tensor([0, 1, 3])

    @pytest.mark.case("S10")
    def test_weight_zero_is_plain_conditional_sampling(self) -> None:
        assert torch.equal(
            sample(self.model, self.noise, self.y, guidance(0.0)), sample(self.model, self.noise, self.y)
        )

    @pytest.mark.case("S10")
    def test_no_label_guided_by_no_label_is_no_label(self) -> None:
        none = torch.full((3,), -1)
        guided = sample(self.model, self.noise, none, guidance(1.7))
        assert torch.allclose(guided, sample(self.model, self.noise, none), atol=1e-5)
        assert torch.allclose(guided, sample(self.model, self.noise), atol=1e-5)

    @pytest.mark.case("S10")
    def test_formula_with_known_outputs(self) -> None:
        """With outputs that depend on the label alone, x = z exp(a_c + w (a_c - a_u)) + b_c + w (b_c - b_u)."""
        model = TarFlow(config(num_blocks=1, layers_per_block=1, channels=64))
        init_weights(model, 0)
        block = blocks(model)[0]
        with torch.no_grad():
            for p in (block.proj_in.weight, block.proj_in.bias, block.pos_embed, block.proj_out.bias):
                p.zero_()
            for layer in block.attn_blocks:
                for linear in (layer.attention.proj, layer.mlp.main[2]):
                    linear.weight.zero_(), linear.bias.zero_()
            block.class_embed.zero_()
            block.class_embed[1, 0, 0] = 1.0
            block.proj_out.weight[:, 0] = torch.cat([torch.full((12,), 0.3), torch.full((12,), -0.7)])
        a_c, b_c, a_u, b_u = 0.3, -0.7, 0.3 / 4, -0.7 / 4  # no label: the mean of the four embeddings
        for w in (0.0, 1.0, 2.3):
            x = model.patchify(sample(model, self.noise[:1], torch.tensor([1]), guidance(w)))
            a, b = a_c + w * (a_c - a_u), b_c + w * (b_c - b_u)
            assert torch.allclose(x[:, 1:], self.noise[:1, 1:] * math.exp(a) + b, atol=1e-5)

    @pytest.mark.case("S10")
    def test_one_batch_of_both_halves_equals_two_passes(self) -> None:
        block, y = blocks(self.model)[0], self.y
        x = self.noise.clone()
        with torch.no_grad():
            for i in range(1, 16):
                a_c, b_c = block.scale_and_shift(x, y)
                a_u, b_u = block.scale_and_shift(x, None)
                a, b = (c + 1.5 * (c - u) for c, u in ((a_c[:, i], a_u[:, i]), (b_c[:, i], b_u[:, i])))
                x[:, i] = self.noise[:, i] * torch.exp(a) + b
        halves = Guidance.of_block(guidance(1.5), 0, 1, 16)
        with torch.no_grad():
            assert torch.allclose(invert_block(block, self.noise, y, halves), x, atol=1e-5)

    @pytest.mark.case("S10")
    def test_label_outside_the_classes_is_refused(self) -> None:
        for bad in (4, -2):
            with pytest.raises(ValueError, match=f"label {bad} is outside the model's 4 classes"):
                sample(self.model, self.noise, torch.tensor([0, 1, bad]))

    @pytest.mark.case("S01")
    def test_an_image_does_not_depend_on_its_batch(self) -> None:
        together = sample(self.model, self.noise, self.y, guidance(1.0, annealed=True))
        alone = sample(self.model, self.noise[1:2], self.y[1:2], guidance(1.0, annealed=True))
        assert (together[1] - alone[0]).abs().max() < 1e-4
        assert (to_pixels(together[1]).int() - to_pixels(alone[0]).int()).abs().max() <= 1

    def test_wrong_settings_name_the_setting(self) -> None:
        with pytest.raises(ValueError, match=r"guide\n.*should be 'a', 'b' or 'ab'"):
            guidance(1.0, guide="c")
        with pytest.raises(ValueError, match=r"attn_temp\n.*should be greater than"):
            guidance(1.0, attn_temp=0)


def test_short_bfloat16_sequences_on_the_cpu_attend_as_long_ones_do() -> None:
    from tarflow.models import transformer

    q, k, v = (torch.randn(2, 2, 16, 64, generator=torch.Generator().manual_seed(s)).bfloat16() for s in range(3))
    dense = transformer.causal_attention(q, k, v)
    flash = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert (dense.float() - flash).abs().max() < 0.05
    changed = v.clone()
    changed[:, :, 9:] = 100
    assert torch.equal(transformer.causal_attention(q, k, changed)[:, :, :9], dense[:, :, :9])  # causal


def test_layers_computed_twice_give_the_same_bits_from_a_fraction_of_the_memory() -> None:
    model = perturbed(config(num_blocks=2, layers_per_block=4)).requires_grad_(False)
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores, kept = [], []
    for recompute in (False, True):
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = images.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            total = log_likelihood(model, x, torch.tensor([0, 1, -1]), recompute=recompute).sum()
        scores.append(torch.autograd.grad(total, x)[0])
        kept.append(sum(sizes.values()))
    assert torch.equal(*scores)
    assert kept[1] < kept[0] / 4


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    a, b, other = TarFlow(config()), TarFlow(config()), TarFlow(config(num_blocks=5))
    torch.manual_seed(0)
    init_weights(a, 7)
    torch.manual_seed(1)
    init_weights(b, 7)
    init_weights(other, 7)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert all(torch.equal(p, other.state_dict()[n]) for n, p in a.state_dict().items())
    init_weights(b, 8)
    assert not torch.equal(blocks(a)[0].proj_in.weight, blocks(b)[0].proj_in.weight)
    assert all(block.proj_out.weight.abs().max() == 0 for block in blocks(a))


@pytest.mark.case("T14")
def test_a_batch_that_is_not_finite_leaves_the_prior_alone() -> None:
    model = TarFlow(config(nvp=False))
    model.update_prior(torch.full((16, 12), 3.0))
    before = model.var.clone()
    assert before[0, 0] == pytest.approx(1.2)
    broken = torch.full((16, 12), 3.0)
    broken[3, 4] = float("nan")
    model.update_prior(broken)
    assert torch.equal(model.var, before)
