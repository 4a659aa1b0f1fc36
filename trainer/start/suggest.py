"""Writes a configuration for a data set: sizes, channels, classes and splits from the data, the rest from their number.

A starting point, with the reason for each choice in a comment.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.survey import DataSurvey, survey
from tarflow.image_size import Size, sides
from tarflow.trainer.errors import TrainerError

MOST_PIXELS = 256  # larger images are for people to decide on: the cost grows with the square
_FEWEST, _MOST = 16, 256  # tokens: fewer lose the structure of an image, the cost of more grows with the square
_SMALL = 64  # tokens, and pixels, of a first run on a small set: a laptop should see it learn


@dataclass(frozen=True)
class Scale:
    """A model and its schedule for up to `images` training images."""

    images: float
    channels: int
    num_blocks: int
    layers_per_block: int
    lr: str
    batch: int
    epochs: int


#                images channels blocks layers  lr     batch epochs
_SCALES = (
    Scale(20_000,        128,     4,     2, "1e-3",   64,   200),
    Scale(200_000,       384,     6,     4, "3e-4",  128,   200),
    Scale(float("inf"),  768,     8,     8, "1e-4",  256,   200),
)  # fmt: skip


def suggest(data: str) -> str:
    """The text of a configuration file for a data set.

    `data`: its folder or address, or the folder that holds its splits train and val. Raises DataError, or TrainerError if
    too little is known of its images.
    """
    train, validation = splits(data)
    seen = survey(DataSettings.of(train))
    if seen.index is None or not seen.sides:
        raise TrainerError(
            f"{train}: what its images are cannot be told; give a data set with an index (`tarflow data index`)"
        )
    number, unlabelled = seen.index.num_samples, seen.index.unlabelled
    classes = 0 if unlabelled else seen.num_classes
    scale = next(s for s in _SCALES if number <= s.images)
    size, patch, why = grid_of(seen, small=scale is _SCALES[0])
    # A power of two, so that it divides over any usual number of processes; a small set is seen in several steps an epoch.
    batch = max(1, min(scale.batch, 1 << (max(number, 1).bit_length() - 1)))
    steps = max(1, -(-number * scale.epochs // batch))
    most = steps * batch
    longer, tokens = max(sides(size)), math.prod(side // patch for side in sides(size))
    noise = 0.1 if longer < 64 else 0.05 if longer == 64 else 0.15
    held_out = f"\n  validation: {_quoted(validation)}" if validation else "\n  # validation: none was found beside it"
    return f"""# Written by `tarflow init`.
# data: {seen}
data:
  train: {_quoted(train)}{held_out}

model:
  image_size: {json.dumps(size)}  # {why}
  patch_size: {patch}  # {tokens} tokens of {patch} x {patch} px; a smaller patch is better and dearer
  in_channels: {seen.channels}  # {"colour" if seen.channels == 3 else "grey"}
  num_classes: {classes}  # {_why_classes(classes, unlabelled, number)}
  channels: {scale.channels}  # channels, blocks and layers: for {number:,} images; more of them want a larger model
  num_blocks: {scale.num_blocks}
  layers_per_block: {scale.layers_per_block}

train:
  global_batch_size: {batch}
  max_images: {most}  # about {most // max(number, 1)} times each image
  noise_std: {noise}  # more noise trains more easily; samples are denoised
  label_dropout: {0.1 if classes else 0}{"  # lets samples be guided" if classes else ""}
  grad_clip: 1.0

optim:
  lr: {scale.lr}
  warmup_images: {min(most // 20 or 1, max(number, 1))}

checkpoint:
  every_images: {max(batch, most // 10)}

evaluation:
  num_samples: {max(2, min(5000, number))}
  grid: [{min(classes, 10) or 8}, 8]
"""


def _why_classes(classes: int, unlabelled: int, number: int) -> str:
    if unlabelled == number:
        return "the data have no labels"
    return (
        "as the data have"
        if classes
        else f"{unlabelled:,} of the images have no label; data.on_error=skip leaves them out"
    )


def splits(data: str) -> tuple[str, str | None]:
    """(training data, held-out data or None) of a data set, or of the folder that holds its splits."""
    folder = Path(data)
    if "://" in data or _indexed(folder) or not _indexed(folder / "train"):
        beside = [folder.parent / name for name in _VALIDATION] if folder.name == "train" else []
        return data, next((str(p) for p in beside if _indexed(p)), None)
    return str(folder / "train"), next((str(p) for n in _VALIDATION if _indexed(p := folder / n)), None)


_VALIDATION = ("val", "validation", "valid")


def _indexed(folder: Path) -> bool:
    return (folder / "index" / "shards.parquet").is_file()


def grid_of(seen: DataSurvey, small: bool) -> tuple[Size, int, str]:
    """(image_size, patch_size, why): the largest size, up to that of the images, with a reasonable number of patches.

    Images that were prepared as rectangles keep their size; all others are taken as squares.
    """
    prepared = (
        seen.index.image_size[::-1] if seen.index is not None and seen.index.crop and seen.index.image_size else (1, 1)
    )
    if prepared[0] != prepared[1]:
        common = math.gcd(*prepared)
        patches = [p for p in range(1, common + 1) if common % p == 0]
        few = [p for p in patches if math.prod(prepared) <= _MOST * p * p]
        return prepared, min(few, default=common), "as the images were prepared, height and width"
    side = seen.sides[len(seen.sides) // 2]
    what = f"the images' shorter side is {side} px" if seen.image_size else f"half of the images have {side} px or more"
    for size in range(min(side, MOST_PIXELS), 0, -1):
        most = _SMALL if small and size <= _SMALL else _MOST
        patches = [p for p in range(1, size + 1) if size % p == 0 and _FEWEST <= (size // p) ** 2 <= most]
        if patches:
            break
    else:
        return side, 1, what
    if size < min(side, MOST_PIXELS):
        what += f"; {size} px can be cut into patches"
    elif size < side:
        what += f"; {MOST_PIXELS} px to begin with"
    return size, patches[0], what


def _quoted(text: str) -> str:
    """A path as a YAML scalar, whatever characters it has."""
    return json.dumps(text, ensure_ascii=False)
