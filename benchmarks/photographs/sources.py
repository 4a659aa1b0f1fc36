"""Which photographs, of which packages: chosen by name where a package also holds drawings.

| kind | package | what |
|---|---|---|
| land | lomiri-wallpapers-16.04, -20.04, mate-backgrounds, plasma-workspace-wallpapers | wallpapers |
| land | gcompris-qt-data | animals, monuments, landscapes: WebP inside resource files |
| land | opencv-doc | test images, one of each scene |
| sky | stellarium-data | galaxies, clusters and nebulae |
| worlds | stellarium-data | maps of planets and moons |
"""

import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tarflow.data_pipeline.prepare.fetch import wallpapers

WALLPAPERS = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds", "plasma-workspace-wallpapers")
PACKAGES = (*WALLPAPERS, "gcompris-qt-data", "opencv-doc", "stellarium-data")
KINDS = ("land", "sky", "worlds")

_GCOMPRIS = [
    "clickgame",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
    "explore_world_music",
]
_OPENCV = """
    aero1.jpg aero3.jpg aloeL.jpg apple.jpg baboon.jpg board.jpg box_in_scene.png building.jpg butterfly.jpg
    chicky_512.png ela_original.jpg fruits.jpg graf1.png home.jpg left.jpg leuvenA.jpg messi5.jpg orange.jpg
    rubberwhale1.png smarties.png squirrel_cls.jpg stuff.jpg
""".split()  # noqa: SIM905
_WORLDS = """
    2007OR10 amalthea callisto ceres deimos dione earth_cmap enceladus eros europa ganymede iapetus io jupiter mars mercury
    mimas miranda moon_4k phobos phoebe rhea sun tethys titania triton umbriel vesta venus
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Photograph:
    """One photograph: its package, its kind, a name that no other has, and how its pixels are read (RGB)."""

    package: str
    kind: str
    name: str
    read: Callable[[], Image.Image]


def download(folder: Path) -> None:
    """Unpack every package into FOLDER/PACKAGE, without installing it. What is there already is left as it is."""
    missing = [package for package in PACKAGES if not (folder / package).is_dir()]
    if not missing:
        return
    fetched = folder / "download"
    shutil.rmtree(fetched, ignore_errors=True)
    fetched.mkdir(parents=True)
    get = ["apt-get", "download", *missing]
    print(f"{' '.join(get)} (Debian; about 550 MB for all)", flush=True)
    try:
        subprocess.run(get, cwd=fetched, check=True, capture_output=True, text=True)
        for archive in sorted(fetched.glob("*.deb")):
            package = archive.name.split("_")[0]
            subprocess.run(["dpkg-deb", "-x", archive.name, f"{package}.part"], cwd=fetched, check=True)
            (fetched / f"{package}.part").rename(folder / package)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise SystemExit(
            f"cannot get {', '.join(missing)}: {said}\nRun `apt-get update` first; elsewhere than on Debian, unpack these "
            f"packages into {folder}/PACKAGE yourself"
        ) from None
    shutil.rmtree(fetched)


def photographs(folder: Path) -> list[Photograph]:
    """All photographs of the unpacked packages, in the order of their packages and names."""
    found = [*_files(folder), *_inside_resources(folder)]
    names = [photo.name for photo in found]
    assert len(set(names)) == len(names), "two photographs of one name would share their tiles"
    return found


def _files(folder: Path) -> Iterator[Photograph]:
    """Those that are files of their own."""
    for package in WALLPAPERS:
        share = folder / package / "usr/share"
        for path in wallpapers(share):
            yield Photograph(package, "land", path.relative_to(share).with_suffix("").as_posix(), _reader(path))
    data = folder / "opencv-doc/usr/share/doc/opencv-doc/examples/data"
    for name in _OPENCV:
        yield Photograph("opencv-doc", "land", f"opencv/{Path(name).stem}", _reader(data / name))
    stellarium = folder / "stellarium-data/usr/share/stellarium"
    for path in sorted((stellarium / "nebulae/default").glob("*.png")):
        yield Photograph("stellarium-data", "sky", f"sky/{path.stem}", _reader(path))
    for name in _WORLDS:
        (path,) = (stellarium / "textures").glob(f"{name}.[pj][np]g")
        yield Photograph("stellarium-data", "worlds", f"worlds/{name}", _reader(path))


def _inside_resources(folder: Path) -> Iterator[Photograph]:
    """WebP files of at least 256 px inside Qt's resource files, which hold them as they are."""
    for resource in _GCOMPRIS:
        path = folder / f"gcompris-qt-data/usr/share/gcompris-qt/rcc/{resource}.rcc"
        for number, content in enumerate(webp_files(path.read_bytes())):
            with Image.open(io.BytesIO(content)) as image:
                if min(image.size) >= 256:
                    name = f"gcompris/{resource}-{number:02}"
                    yield Photograph("gcompris-qt-data", "land", name, _reader(io.BytesIO(content)))


def webp_files(content: bytes) -> Iterator[bytes]:
    """The WebP files inside a larger file: `RIFF`, the length of what follows (32 bits, little-endian), `WEBP`."""
    place = content.find(b"RIFF")
    while place >= 0:
        if content[place + 8 : place + 12] == b"WEBP":
            length = 8 + int.from_bytes(content[place + 4 : place + 8], "little")
            yield content[place : place + length]
        place = content.find(b"RIFF", place + 4)


def _reader(source: Path | io.BytesIO) -> Callable[[], Image.Image]:
    def read() -> Image.Image:
        with Image.open(source) as image:
            return image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")

    return read
