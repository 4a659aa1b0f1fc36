"""Pretrained networks that turn images into features, by name. Never random weights: a missing file is an error.

A metric is named after its network (see `metrics.names`); only the FID Inception with its published weights gives an FID.
Weights come from packages, or from a file that the user supplies; their SHA-256 is recorded in every result and every file
of reference statistics. A file of unknown hash is used under a name that carries its hash.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflow.errors import UserError
from tarflow.evaluation.batches import FEATURES, Batches
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.names import FID_NETWORK
from tarflow.evaluation.networks import vision_transformer
from tarflow.evaluation.networks.packaged import FEATURE_DIM, PACKAGED, streamline, weights_of_package
from tarflow.evaluation.networks.weights_file import fill, read_tensors, sha256_of
from tarflow.models.float32 import TRUE_FLOAT32, products

log = logging.getLogger("tarflow.evaluation")

INPUT_SIZE = 224
# Images per forward pass. On a CPU small passes fit the cache and are three times as fast as passes of 64.
_CHUNK_CPU = 4
_CHUNK_ELSEWHERE = 64
_IMAGENET = ((255 * 0.485, 255 * 0.456, 255 * 0.406), (255 * 0.229, 255 * 0.224, 255 * 0.225))


def to_network_input(images: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """uint8 [N, C, H, W], C = 1 or 3 -> float32 [N, 3, size, size] in 0..255: the same for samples and data.

    Bicubic with antialias, float32, clamped to 0..255, not rounded; grey is repeated to three equal channels. A
    rectangle is resized as a whole, as every published program does: its features see it stretched to a square.
    """
    _check(images)
    x = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
    return x.clamp(0, 255).expand(-1, 3, -1, -1)


def to_fid_input(images: Tensor) -> Tensor:
    """The same for the network of 2015, with the resize that defines FID: float32 [N, 3, 299, 299] in 0..255."""
    from tarflow.evaluation.networks.inception import resize_like_2015

    _check(images)
    return resize_like_2015(images).expand(-1, 3, -1, -1)


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise EvaluationError(
            f"feature networks take uint8 images [N, 1 or 3, H, W], got {images.dtype} {list(images.shape)}"
        )


def _resize_text(size: int) -> str:
    return f"grey repeated to RGB; float32 bicubic with antialias to {size}, clamped to 0..255, not rounded"


@dataclass
class _Network:
    """A network ready to use: module, preprocessing, input scaling, and the classifier on its features if it has one."""

    module: nn.Module
    sha256: str
    dim: int
    prepare: Callable[[Tensor], Tensor]
    preprocessing: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    logits: Callable[[Tensor], Tensor] | None = None
    num_classes: int = 0  # of `logits`
    spatial_dim: int = 0  # numbers that `module` gives after the features


def _packaged(name: str) -> _Network:
    source = PACKAGED[name]
    module = source.build(weights_of_package(name, source)).eval()
    streamline(module)
    text = f"{_resize_text(INPUT_SIZE)}; {source.scaling}"
    return _Network(module, source.sha256, FEATURE_DIM, to_network_input, text, source.mean, source.std)


def _inception(
    path: Path, variant: str, prepare: Callable[[Tensor], Tensor], text: str, grey: float, beside: tuple[str, ...] = ()
) -> _Network:
    """`grey`: subtracted from the pixels, which are then divided by it."""
    from tarflow.evaluation.networks.inception import DIM, SPATIAL_DIM, Inception  # loads torchvision: a second

    network = Inception(variant).eval()
    fill(network, read_tensors(path), str(path), beside)
    scale = (grey, grey, grey)
    classes, logits = network.fc.out_features, network.logits
    return _Network(network.fold(), sha256_of(path), DIM, prepare, text, scale, scale, logits, classes, SPATIAL_DIM)


def _fid_inception(path: Path) -> _Network:
    text = "grey repeated to RGB; bilinear to 299 without antialias as in TensorFlow 1; (x - 128) / 128; last pooling"
    return _inception(path, "fid", to_fid_input, text, 128.0)


def _fid_inception_pytorch(path: Path) -> _Network:
    from tarflow.evaluation.networks.inception import SIZE

    def prepare(images: Tensor) -> Tensor:
        _check(images)
        x = F.interpolate(images.float(), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        return x.expand(-1, 3, -1, -1)

    text = "grey repeated to RGB; bilinear to 299 without antialias, as pytorch-fid; (x - 127.5) / 127.5; last pooling"
    return _inception(path, "fid", prepare, text, 127.5)


def _fid_inception_clean(path: Path) -> _Network:
    from tarflow.evaluation.networks.inception import SIZE

    def prepare(images: Tensor) -> Tensor:
        return to_network_input(images, SIZE)

    return _inception(path, "fid", prepare, f"{_resize_text(SIZE)}, as clean-fid; (x - 128) / 128; last pooling", 128.0)


def _torchvision_inception(path: Path) -> _Network:
    from tarflow.evaluation.networks.inception import SIZE

    def prepare(images: Tensor) -> Tensor:
        return to_network_input(images, SIZE)

    text = f"{_resize_text(SIZE)}; (x - 127.5) / 127.5; last pooling"
    # The auxiliary classifier is used in training only.
    return _inception(path, "torchvision", prepare, text, 127.5, beside=("AuxLogits.",))


def _dinov2(path: Path) -> _Network:
    network = vision_transformer.from_weights(read_tensors(path), str(path)).eval()
    text = f"{_resize_text(INPUT_SIZE)}; ImageNet mean and standard deviation; class token after the last norm"
    return _Network(network, sha256_of(path), network.dim, to_network_input, text, *_IMAGENET)


@dataclass(frozen=True)
class _FromFile:
    """A network whose weights the user supplies, and the first digits of the published file's hash, if known."""

    build: Callable[[Path], _Network]
    file: str  # its published name
    sha256: str = ""


_INCEPTION_2015 = (
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
FROM_FILE = {
    FID_NETWORK: _FromFile(_fid_inception, *_INCEPTION_2015),
    # The same weights behind other rules of resizing: to compare with the statistics that other programs wrote.
    "fid_inception_pytorch": _FromFile(_fid_inception_pytorch, *_INCEPTION_2015),
    "fid_inception_clean": _FromFile(_fid_inception_clean, *_INCEPTION_2015),
    # The published file name holds the first digits of the hash.
    "torchvision_inception": _FromFile(_torchvision_inception, "inception_v3_google-0cc3c7bd.pth", "0cc3c7bd"),
    "dinov2": _FromFile(_dinov2, "dinov2_vits14_pretrain.pth, or another of the family"),
}
NETWORKS = (*PACKAGED, *FROM_FILE)


class Features:
    """A feature network: call it with uint8 images [N, C, H, W] to get float32 features [N, dim] on the CPU.

    Inception networks also have `spatial_dim` spatial features (`with_spatial`), of which sFID is the distance.
    `name`, `sha256` (of the weights file) and `preprocessing` identify it; `warnings` lists caveats about its weights.
    `file`: weights of a network that no package provides. Images are processed in small chunks, so memory is bounded, and
    the batch that an image is in changes its features by float rounding only.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu", file: str | Path | None = None) -> None:
        if name not in NETWORKS:
            raise EvaluationError(
                f"evaluation.features={name!r} is not a feature network; choose one of {', '.join(NETWORKS)}"
            )
        self.name, self.warnings = name, list[str]()
        self.device = torch.device(device)
        self.batches = Batches(self.device)
        network = self._from_file(name, file) if name in FROM_FILE else _packaged(name)
        if name in PACKAGED and file is not None:
            raise EvaluationError(f"the weights of {name} come with a package; leave evaluation.features_file out")
        self.dim, self.sha256, self.preprocessing = network.dim, network.sha256, network.preprocessing
        self.spatial_dim = network.spatial_dim  # 0: the network has no spatial features
        self._network = network
        self._module = network.module.requires_grad_(False).to(self.device).to(memory_format=torch.channels_last)
        self._mean = torch.tensor(network.mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(network.std, device=self.device).view(3, 1, 1)

    def _from_file(self, name: str, file: str | Path | None) -> _Network:
        source = FROM_FILE[name]
        if file is None:
            raise EvaluationError(
                f"no package provides the feature network {name}: give the file of its weights ({source.file}) as "
                "evaluation.features_file=PATH (of `tarflow reference` and `tarflow score`: --features-file PATH)"
            )
        path = Path(file)
        if not path.is_file():
            raise EvaluationError(
                f"there are no weights of {name} at {path}; set evaluation.features_file to {source.file}"
            )
        try:
            network = source.build(path)
        except UserError as error:
            raise EvaluationError(f"evaluation.features_file (expected {source.file}): {error}") from None
        if not source.sha256 or not network.sha256.startswith(source.sha256):
            self.name = f"{name}-{network.sha256[:8]}"
            expected = f"; the published file's begins with {source.sha256[:8]}" if source.sha256 else ""
            self.warnings.append(
                f"weights of unknown origin in {path.name} (SHA-256 {network.sha256[:16]}...{expected}): scores are named "
                f"after them, {self.name}, and compare with no published figure"
            )
            log.warning(self.warnings[-1])
        return network

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if the network only has features."""
        return self._network.num_classes

    def __call__(self, images: Tensor) -> Tensor:
        """Pixels uint8 [N, C, H, W] to features float32 [N, dim], on the CPU."""
        return self.with_spatial(images)[0]

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same in one pass with the spatial features float32 [N, spatial_dim], which may be none."""
        if not len(images):
            return torch.empty(0, self.dim), torch.empty(0, self.spatial_dim)
        with products(TRUE_FLOAT32):
            features, spatial = self._features(images).split([self.dim, self.spatial_dim], dim=1)
        return features, spatial

    def _features(self, images: Tensor) -> Tensor:
        if self.device.type != "cpu":
            return torch.cat([self._together(part) for part in images.split(_CHUNK_ELSEWHERE)])
        # Chunks in parallel, each on one thread, so that threads never wait for each other inside an operation: on
        # shared cores, two threads inside every operation are ten times slower than one.
        threads = torch.get_num_threads()
        if threads == 1:
            return torch.cat([self._together(part) for part in images.split(_CHUNK_CPU)])
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(self._together, images.split(_CHUNK_CPU))))

    def _together(self, images: Tensor) -> Tensor:
        """Features of a batch that should fit into memory; computed in halves where it does not."""
        return torch.cat(self.batches.run(FEATURES, len(images), lambda part: self._forward(images[part])))

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> Tensor:
        x = (self._network.prepare(images.to(self.device)) - self._mean) / self._std
        out: Tensor = self._module(x.contiguous(memory_format=torch.channels_last))
        return (out.mean(dim=(2, 3)) if out.ndim == 4 else out).float().cpu()

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        """Class probabilities [N, classes] of features [N, dim], for the Inception score."""
        if self._network.logits is None:
            raise EvaluationError(f"{self.name} has no classes: an Inception score needs an Inception network")
        with products(TRUE_FLOAT32):
            return self._network.logits(features.to(self.device)).softmax(dim=1).cpu()
