"""The architecture of a TarFlow: everything that determines its parameters, and nothing else."""

import json
import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tarflow.image_size import sides, size_of
from tarflow.settings import LIST, ONE, Count, OneOrList, Section, form_of, one_if_equal

# Beyond anything that fits on a cluster: a typo fails here, by name, and not when memory runs out.
MOST_PIXELS, MOST_CHANNELS, MOST_LAYERS, MOST_CLASSES = 1 << 14, 1 << 16, 1 << 10, 1 << 24
MOST_TOKENS = 1 << 16  # attention is quadratic in them
MOST_LAYERS_IN_ALL = 1 << 12
MOST_PARAMETERS = 1 << 40

Layers = Annotated[Count, Field(gt=0, le=MOST_LAYERS)]
_Side = Annotated[Count, Field(gt=0, le=MOST_PIXELS)]


def _two_sides(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) != 2:
        raise ValueError("a rectangle has two sides, [height, width]")
    if isinstance(value, str) and "," in value:
        raise ValueError("a rectangle is written in brackets, [height, width]")
    return value


ImageSize = Annotated[
    Annotated[_Side, Tag(ONE)] | Annotated[tuple[_Side, _Side], Tag(LIST)],
    Discriminator(form_of),
    BeforeValidator(_two_sides),
    AfterValidator(lambda value: size_of(*sides(value))),  # one spelling for each size
]


class TarFlowConfig(Section):
    """Architecture of one TarFlow (arXiv 2412.06329, section 2).

    An image is split into `num_tokens` patches of `token_dim` numbers. `num_blocks` autoregressive blocks of
    `layers` transformer layers each transform the sequence, alternating between its order and the reverse.
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
    layers_per_block: OneOrList[Layers] = Field(
        description="transformer layers per flow block: one number for all blocks, or a list with one for each in the forward "
        "direction, such as [4, 4, 4, 24], whose last block is the first to be sampled"
    )
    head_channels: Count = Field(64, gt=0, le=MOST_CHANNELS, description="channels per attention head")
    expansion: Count = Field(4, gt=0, le=64, description="hidden width of the MLP as a multiple of channels")
    num_classes: Count = Field(0, ge=0, le=MOST_CLASSES, description="number of classes; 0 = unconditional")
    nvp: bool = Field(
        True, description="true: affine flow (non-volume-preserving); false: shift only, with a learned prior variance"
    )
    soft_clip: float = Field(
        0.0, ge=0, le=1e3, description="c: bound the log-scale a by c * tanh(a / c); 0 = off, as published"
    )
    scale: Literal["exp", "softplus"] = Field(
        "exp",
        description="how the network's output u becomes the scale in x = z * scale + b: exp(u), as published, or "
        "0.001 + 0.999 * softplus(u + log(e - 1)), which is 1 at u = 0, grows linearly and never falls below 0.001. soft_clip "
        "bounds its logarithm besides",
    )
    positions: Literal["learned", "rotary"] = Field(
        "learned",
        description="how attention knows where a patch is: an embedding learned for each patch, as published, or queries and "
        "keys rotated by its row and column instead (no weight depends on image_size then, so that a run at another "
        "resolution can start from these); head_channels must be a multiple of 4",
    )
    qk_norm: bool = Field(
        False,
        description="normalize queries and keys of each head by a layer norm with learned scales (arXiv 2302.05442), which "
        "bounds the logits of attention; false, as published",
    )
    noise_conditioning: bool = Field(
        False,
        description="tell every block the standard deviation of the noise in its images, so that one flow learns the densities"
        " at all noise levels (train.noise_range) and samples are denoised in many steps; see iterative.md",
    )
    input_scale: float = Field(
        1.0, ge=1e-3, le=1e3, description="factor on the images before the first block; samples are divided by it"
    )

    @field_validator("layers_per_block")
    @classmethod
    def _spelt_in_one_way(cls, value: int | tuple[int, ...], known: ValidationInfo) -> int | tuple[int, ...]:
        """A list that says the same of every block is that number; one of the wrong length stays, for the error below."""
        fits = isinstance(value, tuple) and len(value) == known.data.get("num_blocks")
        return one_if_equal(value) if fits else value

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
        if len(self.layers) != self.num_blocks:
            raise ValueError(
                f"model.layers_per_block lists {len(self.layers)} blocks, and model.num_blocks={self.num_blocks}: list one "
                "number for each block, or give one number for all"
            )
        if self.channels % self.head_channels:
            raise ValueError(
                f"model.channels={self.channels} is not a multiple of model.head_channels={self.head_channels}"
            )
        if self.scale == "softplus" and not self.nvp:
            raise ValueError(
                "model.scale=softplus needs model.nvp=true: the shift-only flow (model.nvp=false) has no scale"
            )
        if self.noise_conditioning and not self.nvp:
            raise ValueError(
                "model.noise_conditioning=true needs model.nvp=true: the shift-only flow (model.nvp=false) has one volume for "
                "all noise levels, and their densities do not"
            )
        if self.positions == "rotary" and self.head_channels % 4:
            raise ValueError(
                f"model.positions=rotary rotates pairs of channels by rows and as many by columns: model.head_channels="
                f"{self.head_channels} must be a multiple of 4"
            )
        if self.noise_conditioning and self.channels % 2:
            raise ValueError(
                "model.noise_conditioning needs an even model.channels, half for sines and half for cosines; got "
                f"{self.channels}"
            )
        if 0 < self.soft_clip < 1e-6:
            raise ValueError(f"model.soft_clip={self.soft_clip:g} must be 0 (off) or at least 1e-6")
        # Each setting is bounded on its own; their products decide what fits into memory.
        _at_most(self.num_tokens, MOST_TOKENS, "tokens", "a larger model.patch_size, or smaller images")
        _at_most(
            sum(self.layers), MOST_LAYERS_IN_ALL, "layers in total", "fewer model.num_blocks or model.layers_per_block"
        )
        _at_most(self._weights, MOST_PARAMETERS, "parameters", "a smaller model, or fewer model.num_classes")
        return self

    @property
    def _weights(self) -> int:
        """Parameters of all matrices and embeddings, near enough for a bound (`cost.parameters` is exact)."""
        layer = (4 + 2 * self.expansion) * self.channels**2
        ends = self.channels * (3 * self.token_dim + self.num_tokens + self.num_classes)
        ends += 8 * self.channels**2 * self.noise_conditioning
        return sum(self.layers) * layer + self.num_blocks * ends

    @property
    def layers(self) -> tuple[int, ...]:
        """Transformer layers of every block, in the forward direction."""
        per_block = self.layers_per_block
        return per_block if isinstance(per_block, tuple) else (per_block,) * self.num_blocks

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
