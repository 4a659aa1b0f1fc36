"""Inception v3 (Szegedy et al., arXiv 1512.00567) out of torchvision's blocks, for weights in a file.

`fid`: the network of 2015 that FID is defined by, as converted to PyTorch (1,008 classes): averages exclude the
padding, and the last block takes a maximum. `torchvision`: torchvision's network as it is. The names of the tensors are
those of both files, which agree.

sFID (Nash et al., arXiv 2103.03841) takes the features of a layer that still knows positions. Which numbers it takes is
defined by the evaluator of ADM (arXiv 2105.05233): the first 7 channels of the graph's `mixed_6/conv`, 17 x 17 positions.
That is the first branch of the block called Mixed_6d here, after its ReLU, so also the first channels of the block's output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d, Inception3, InceptionE

SIZE = 299
DIM = 2048
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17
SPATIAL_DIM = SPATIAL_CHANNELS * SPATIAL_SIDE**2  # 2,023
_AVERAGING = ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b")  # blocks with an average in front of `branch_pool`


class Inception(Inception3):
    """[N, 3, 299, 299] -> features [N, 2048 + 2023]; `logits` has the classes of the Inception score."""

    def __init__(self, variant: str) -> None:
        fid = variant == "fid"
        super().__init__(num_classes=1008 if fid else 1000, aux_logits=False, init_weights=False)
        self.fid = fid
        if fid:
            for name in _AVERAGING:
                self.get_submodule(f"Mixed_{name}.branch_pool").register_forward_pre_hook(_exclude_padding)
            self.Mixed_7c = _LastBlock(DIM)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 299, 299] -> [N, 2048 + 2023]: the output of the last pooling, and after it the spatial features.

        These are in the order of TensorFlow: positions row by row, the 7 channels of each position together.
        """
        spatial = x
        for layer in list(self.children())[:-1]:  # all but the classifier, in torchvision's order
            x = layer(x)
            if layer is self.Mixed_6d:
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return torch.cat([x.flatten(1), spatial], dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """Features [N, 2048] -> [N, classes]. The Inception score of the 2015 network is without the bias."""
        return F.linear(features, self.fc.weight, None if self.fid else self.fc.bias)

    def fold(self) -> "Inception":
        """The same function at less cost, for evaluation: every batch norm is folded into the convolution before it."""
        for part in self.modules():
            if isinstance(part, BasicConv2d):
                assert isinstance(part.bn, nn.BatchNorm2d), "folded twice"
                part.conv, part.bn = fuse_conv_bn_eval(part.conv, part.bn), nn.Identity()
        return self


def _exclude_padding(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Averages over 3 x 3 positions with padding -> averages over those inside the image."""
    (x,) = inputs
    return x / F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, stride=1, padding=1)


class _LastBlock(InceptionE):
    """The network of 2015 takes a maximum here, not an average."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        *paths, _ = super()._forward(x)
        return [*paths, self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))]


def resize_like_2015(images: Tensor, size: int = SIZE) -> Tensor:
    """[N, C, H, W] in 0..255 -> float32 [N, C, size, size]: bilinear between the pixels at i * H / size, no antialias.

    As in the graph of 2015 that defines FID (TensorFlow 1, neither corners nor pixel centres aligned).
    """
    x = images.float()

    def neighbours(length: int) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)
        low = at.floor().long()
        return low, (low + 1).clamp(max=length - 1), at - low

    top, bottom, down = neighbours(x.shape[2])
    left, right, across = neighbours(x.shape[3])
    upper = x[:, :, top].lerp(x[:, :, bottom], down[:, None])
    return upper[..., left].lerp(upper[..., right], across)
