"""The architecture of a TarFlow: everything that determines its parameters, and nothing else."""

import json
import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from tarflow.image_size import sides, size_of
from tarflow.settings import Count, Section

# Beyond anything that fits on a cluster: a typo fails here, by name, and not when memory runs out.
MOST_PIXELS, MOST_CHANNELS, MOST_LAYERS, MOST_CLASSES = 1 << 14, 1 << 16, 1 << 10, 1 << 24
MOST_TOKENS = 1 << 16  # attention is quadratic in them
MOST_LAYERS_IN_ALL = 1 << 12
MOST_PARAMETERS = 1 << 40

KINDS_OF_SIZE = ("square", "rectangle")  # where an error is, besides the names of settings
_Side = Annotated[Count, Field(gt=0, le=MOST_PIXELS)]


def _two_sides(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) != 2:
        raise ValueError("a rectangle has two sides, [height, width]")
    if isinstance(value, str) and "," in value:
        raise ValueError("a rectangle is written in brackets, [height, width]")
    return value


ImageSize = Annotated[
    Annotated[_Side, Tag(KINDS_OF_SIZE[0])] | Annotated[tuple[_Side, _Side], Tag(KINDS_OF_SIZE[1])],
    Discriminator(lambda value: KINDS_OF_SIZE[isinstance(value, list | tuple)]),
    BeforeValidator(_two_sides),
    AfterValidator(lambda value: size_of(*sides(value))),  # one spelling for each size
]


class TarFlowConfig(Section):
    """Architecture of one TarFlow (arXiv 2412.06329, section 2).

    An image is split into `num_tokens` patches of `token_dim` numbers. `num_blocks` autoregressive blocks of
    `layers_per_block` transformer layers each transform the sequence, alternating between its order and the reverse.
    """

    image_size: ImageSize = Field(
        description="height and width of the images, in pixels: a whole number for squares, [height, width] for rectangles"
    )
    patch_size: Count = Field(
        gt=0, le=MOST_PIXELS, description="height and width of a patch, in pixels; must divide both sides of image_size"
    )
    in_channels: Count = Field(3, description="image channels: 3 (colour) or 1 (grey)")
    channels: Count = Field(
        gt=0, le=MOST_CHANNELS, description="transformer width; must be a multiple of head_channels"
    )
    num_blocks: Count = Field(gt=0, le=MOST_LAYERS, description="number of flow blocks")
    layers_per_block: Count = Field(gt=0, le=MOST_LAYERS, description="transformer layers per flow block")
    head_channels: Count = Field(64, gt=0, le=MOST_CHANNELS, description="channels per attention head")
    expansion: Count = Field(4, gt=0, le=64, description="hidden width of the MLP as a multiple of channels")
    num_classes: Count = Field(0, ge=0, le=MOST_CLASSES, description="number of classes; 0 = unconditional")
    nvp: bool = Field(
        True, description="true: affine flow (non-volume-preserving); false: shift only, with a learned prior variance"
    )
    soft_clip: float = Field(
        0.0, ge=0, le=1e3, description="c: bound the log-scale a by c * tanh(a / c); 0 = off, as published"
    )

    @model_validator(mode="after")
    def _fits(self) -> "TarFlowConfig":
        if self.in_channels not in (1, 3):
            raise ValueError(f"model.in_channels must be 1 (grey) or 3 (colour), got {self.in_channels}")
        if self.height % self.patch_size or self.width % self.patch_size:
            common = math.gcd(self.height, self.width)
            near = [p for p in range(1, common + 1) if common % p == 0]
            raise ValueError(
                f"model.image_size={json.dumps(self.image_size)} is not divisible by model.patch_size={self.patch_size}; "
                f"patch sizes that divide it: {', '.join(map(str, near))}"
            )
        if self.channels % self.head_channels:
            raise ValueError(
                f"model.channels={self.channels} is not a multiple of model.head_channels={self.head_channels}"
            )
        if 0 < self.soft_clip < 1e-6:
            raise ValueError(f"model.soft_clip={self.soft_clip:g} must be 0 (off) or at least 1e-6")
        # Each setting is bounded on its own; their products decide what fits into memory.
        _at_most(self.num_tokens, MOST_TOKENS, "tokens", "a larger model.patch_size, or smaller images")
        layers = self.num_blocks * self.layers_per_block
        _at_most(layers, MOST_LAYERS_IN_ALL, "layers in total", "fewer model.num_blocks or model.layers_per_block")
        _at_most(self._weights, MOST_PARAMETERS, "parameters", "a smaller model, or fewer model.num_classes")
        return self

    @property
    def _weights(self) -> int:
        """Parameters of all matrices and embeddings, near enough for a bound (`cost.parameters` is exact)."""
        layer = (4 + 2 * self.expansion) * self.channels**2
        ends = self.channels * (3 * self.token_dim + self.num_tokens + self.num_classes)
        return self.num_blocks * (self.layers_per_block * layer + ends)

    @property
    def height(self) -> int:
        """H: rows of pixels."""
        return sides(self.image_size)[0]

    @property
    def width(self) -> int:
        """W: columns of pixels."""
        return sides(self.image_size)[1]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches, in row-major order the sequence of tokens."""
        return self.height // self.patch_size, self.width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """T: tokens in the sequence."""
        return math.prod(self.grid)

    @property
    def token_dim(self) -> int:
        """D: numbers in a token."""
        return self.in_channels * self.patch_size**2

    @property
    def num_heads(self) -> int:
        """H: attention heads."""
        return self.channels // self.head_channels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return (self.in_channels, self.height, self.width)


def _at_most(number: int, most: int, what: str, way_out: str) -> None:
    if number > most:
        raise ValueError(f"the model would have {number:,} {what}, more than {most:,}: use {way_out}")
