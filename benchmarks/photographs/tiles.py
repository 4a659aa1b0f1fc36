"""Photographs to tiles, in the layout that `tarflow data prepare` takes: {train,val}/KIND/NAME-across-y-x.png.

A photograph is cut at two scales: it is reduced until the larger, then the smaller number of tiles in `ACROSS` covers its
longer side. So a tile shows a part of a scene at every size, not the grain of a wallpaper of 20 megapixels. Tiles of one scale
do not overlap, and all tiles of a photograph are in one split.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageStat

from benchmarks.photographs.sources import Photograph
from tarflow.data_pipeline import keyed
from tarflow.data_pipeline.prepare.fetch import tile_places

ACROSS = {"land": (8, 4), "sky": (2, 1), "worlds": (4, 2)}  # tiles along the longer side of a photograph, at most
FLAT = 4.0  # grey levels: a tile with a smaller standard deviation shows nothing
HELD_OUT = 0.1  # of the photographs of each kind
COUNTS = "counts.json"


def held_out(photos: Sequence[Photograph], seed: int = 0) -> set[str]:
    """Names of the photographs to hold out: a tenth of each kind, and at least one, drawn by the seed."""
    chosen: set[str] = set()
    for kind in sorted({photo.kind for photo in photos}):
        names = sorted(photo.name for photo in photos if photo.kind == kind)
        order = keyed.permutation(keyed.key(seed, f"photographs {kind}"), len(names))
        chosen |= {names[i] for i in order[: max(1, round(HELD_OUT * len(names)))]}
    return chosen


def reduced(image: Image.Image, longest: int) -> Image.Image:
    """The image, made smaller where its longer side exceeds `longest` pixels; its proportions stay."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def cut(image: Image.Image, size: int, scales: Sequence[int]) -> Iterator[tuple[str, Image.Image]]:
    """(place, tile) for each tile of `size` pixels on centred grids over the image, reduced for each number of tiles in turn.

    A scale after the first counts only if the image has pixels enough to be reduced further: else its tiles would occur twice.
    """
    for number, across in enumerate(scales):
        if number and max(image.size) <= across * size:
            continue
        image = reduced(image, across * size)
        for y, x in tile_places(image.height, image.width, size):
            yield f"{across}-{y}-{x}", image.crop((x, y, x + size, y + size))


def is_flat(tile: Image.Image) -> bool:
    return float(np.mean(ImageStat.Stat(tile.convert("L")).stddev)) < FLAT


def tile_name(photograph: str, place: str) -> str:
    return f"{photograph.replace('/', '-')}-{place}.png"


def photograph_of(tile: str) -> str:
    """The part of a tile's name that all tiles of its photograph share."""
    return tile.rsplit("/", 1)[-1].removesuffix(".png").rsplit("-", 3)[0]


def write_tiles(photos: Iterable[Photograph], size: int, held: set[str], folder: Path) -> Counter[str]:
    """Write all tiles of `size` pixels to the new folder, which appears when they are all there; counts them.

    Counts are by `PACKAGE KIND SPLIT`, and by `PACKAGE KIND flat` for those that were left out.
    """
    if folder.is_dir():
        return Counter(json.loads((folder / COUNTS).read_text()))
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    counts: Counter[str] = Counter()
    for photo in photos:
        split = "val" if photo.name in held else "train"
        target = part / split / photo.kind
        target.mkdir(parents=True, exist_ok=True)
        for place, tile in cut(photo.read(), size, ACROSS[photo.kind]):
            flat = is_flat(tile)
            counts[f"{photo.package} {photo.kind} {'flat' if flat else split}"] += 1
            if not flat:
                tile.save(target / tile_name(photo.name, place), compress_level=1)
    (part / COUNTS).write_text(json.dumps(counts, indent=1))
    part.rename(folder)
    return counts


def count_rows(counts: Counter[str], photos: Sequence[Photograph]) -> list[tuple[Any, ...]]:
    """(package, kind, photographs, tiles to train on, tiles held out, left out as flat) for the table."""
    of = Counter(f"{photo.package} {photo.kind}" for photo in photos)
    return [
        (*key.split(" "), number, *(counts[f"{key} {what}"] for what in ("train", "val", "flat")))
        for key, number in of.items()
    ]
