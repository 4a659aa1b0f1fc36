"""Inception v3 (Szegedy et al., arXiv 1512.00567) with its two ways of pooling, for weights in a file.

`fid`: the network of 2015 that FID is defined by, as converted to PyTorch (1,008 classes): averages leave the padding
out, and the last block takes a maximum. `torchvision`: torchvision's network, whose averages count the padding. The
names of the tensors are those of both files, which agree.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIZE = 299
DIM = 2048
Kernel = int | tuple[int, int]
# name: (in, out, kernel, stride, padding)
Convs = dict[str, tuple[int, int, Kernel, int, Kernel]]
# One path through a block: names of convolutions in turn. A tuple of names is a fork: both are applied, and joined.
Path = Sequence[str | tuple[str, str]]


class Conv(nn.Module):
    """Convolution, batch norm, ReLU; `fold` makes the first two one."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        assert isinstance(self.bn, nn.BatchNorm2d), "folded twice"
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


class Mixed(nn.Module):
    """Paths side by side, joined by channel; the last one starts with pooling."""

    def __init__(self, convs: Convs, paths: Sequence[Path], pool: str, pooled: Path) -> None:
        super().__init__()
        for name, (inputs, outputs, kernel, stride, padding) in convs.items():
            self.add_module(name, Conv(inputs, outputs, kernel, stride, padding))
        self.paths, self.pool, self.pooled = paths, pool, pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(self._along(path, x) for path in self.paths), self._along(self.pooled, self._pool(x))], 1)

    def _along(self, path: Path, x: Tensor) -> Tensor:
        for step in path:
            if isinstance(step, tuple):
                x = torch.cat([self.get_submodule(name)(x) for name in step], 1)
            else:
                x = self.get_submodule(step)(x)
        return x

    def _pool(self, x: Tensor) -> Tensor:
        if self.pool == "reduce":
            return F.max_pool2d(x, 3, stride=2)
        if self.pool == "max":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=self.pool == "average with padding")


def _mixed_5(inputs: int, pool_features: int, pool: str) -> Mixed:
    convs: Convs = {
        "branch1x1": (inputs, 64, 1, 1, 0),
        "branch5x5_1": (inputs, 48, 1, 1, 0),
        "branch5x5_2": (48, 64, 5, 1, 2),
        "branch3x3dbl_1": (inputs, 64, 1, 1, 0),
        "branch3x3dbl_2": (64, 96, 3, 1, 1),
        "branch3x3dbl_3": (96, 96, 3, 1, 1),
        "branch_pool": (inputs, pool_features, 1, 1, 0),
    }
    paths = [
        ["branch1x1"],
        ["branch5x5_1", "branch5x5_2"],
        ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
    ]
    return Mixed(convs, paths, pool, ["branch_pool"])


def _mixed_6a() -> Mixed:
    convs: Convs = {
        "branch3x3": (288, 384, 3, 2, 0),
        "branch3x3dbl_1": (288, 64, 1, 1, 0),
        "branch3x3dbl_2": (64, 96, 3, 1, 1),
        "branch3x3dbl_3": (96, 96, 3, 2, 0),
    }
    return Mixed(convs, [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]], "reduce", [])


def _mixed_6(width: int, pool: str) -> Mixed:
    wide, tall = ((1, 7), (0, 3)), ((7, 1), (3, 0))
    convs: Convs = {
        "branch1x1": (768, 192, 1, 1, 0),
        "branch7x7_1": (768, width, 1, 1, 0),
        "branch7x7_2": (width, width, wide[0], 1, wide[1]),
        "branch7x7_3": (width, 192, tall[0], 1, tall[1]),
        "branch7x7dbl_1": (768, width, 1, 1, 0),
        "branch7x7dbl_2": (width, width, tall[0], 1, tall[1]),
        "branch7x7dbl_3": (width, width, wide[0], 1, wide[1]),
        "branch7x7dbl_4": (width, width, tall[0], 1, tall[1]),
        "branch7x7dbl_5": (width, 192, wide[0], 1, wide[1]),
        "branch_pool": (768, 192, 1, 1, 0),
    }
    paths = [
        ["branch1x1"],
        [f"branch7x7_{i}" for i in (1, 2, 3)],
        [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)],
    ]
    return Mixed(convs, paths, pool, ["branch_pool"])


def _mixed_7a() -> Mixed:
    convs: Convs = {
        "branch3x3_1": (768, 192, 1, 1, 0),
        "branch3x3_2": (192, 320, 3, 2, 0),
        "branch7x7x3_1": (768, 192, 1, 1, 0),
        "branch7x7x3_2": (192, 192, (1, 7), 1, (0, 3)),
        "branch7x7x3_3": (192, 192, (7, 1), 1, (3, 0)),
        "branch7x7x3_4": (192, 192, 3, 2, 0),
    }
    return Mixed(convs, [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in (1, 2, 3, 4)]], "reduce", [])


def _mixed_7(inputs: int, pool: str) -> Mixed:
    convs: Convs = {
        "branch1x1": (inputs, 320, 1, 1, 0),
        "branch3x3_1": (inputs, 384, 1, 1, 0),
        "branch3x3_2a": (384, 384, (1, 3), 1, (0, 1)),
        "branch3x3_2b": (384, 384, (3, 1), 1, (1, 0)),
        "branch3x3dbl_1": (inputs, 448, 1, 1, 0),
        "branch3x3dbl_2": (448, 384, 3, 1, 1),
        "branch3x3dbl_3a": (384, 384, (1, 3), 1, (0, 1)),
        "branch3x3dbl_3b": (384, 384, (3, 1), 1, (1, 0)),
        "branch_pool": (inputs, 192, 1, 1, 0),
    }
    paths: list[Path] = [
        ["branch1x1"],
        ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
        ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
    ]
    return Mixed(convs, paths, pool, ["branch_pool"])


class Inception(nn.Module):
    """[N, 3, 299, 299] -> features [N, 2048]; `logits` has the classes of the Inception score."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        fid = variant == "fid"
        average = "average" if fid else "average with padding"
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = _mixed_5(192, 32, average)
        self.Mixed_5c = _mixed_5(256, 64, average)
        self.Mixed_5d = _mixed_5(288, 64, average)
        self.Mixed_6a = _mixed_6a()
        self.Mixed_6b = _mixed_6(128, average)
        self.Mixed_6c = _mixed_6(160, average)
        self.Mixed_6d = _mixed_6(160, average)
        self.Mixed_6e = _mixed_6(192, average)
        self.Mixed_7a = _mixed_7a()
        self.Mixed_7b = _mixed_7(1280, average)
        self.Mixed_7c = _mixed_7(2048, "max" if fid else average)
        self.fc = nn.Linear(DIM, 1008 if fid else 1000)
        self.fid = fid

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Features [N, 2048] -> [N, classes]. The Inception score of the 2015 network leaves the bias out."""
        return F.linear(features, self.fc.weight, None if self.fid else self.fc.bias)

    def fold(self) -> "Inception":
        """The same function at less cost, for evaluation."""
        for part in self.modules():
            if isinstance(part, Conv):
                part.fold()
        return self


def resize_like_2015(images: Tensor, size: int = SIZE) -> Tensor:
    """[N, C, H, W] in 0..255 -> float32 [N, C, size, size]: bilinear between the pixels at i * H / size, no antialias.

    That is what the graph of 2015 does (TensorFlow 1, corners and pixel centres not aligned); FID is defined by it.
    """
    x = images.float()

    def places(length: int) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)
        low = at.floor().long()
        return low, (low + 1).clamp(max=length - 1), at - low

    top, bottom, down = places(x.shape[2])
    left, right, across = places(x.shape[3])
    upper = x[:, :, top].lerp(x[:, :, bottom], down[:, None])
    return upper[..., left].lerp(upper[..., right], across)
