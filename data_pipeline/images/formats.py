"""Which files are images: one list for tars, folders, streams and scores; and pictures that cannot be read.

The list is what the installed Pillow decodes: AVIF and JPEG 2000 are in it if Pillow was built with them. Formats that Pillow
hands to other programs (EPS, WMF) or only identifies are never opened.
"""

from __future__ import annotations

from PIL import Image, features

_CANDIDATES = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "CUR", "ICNS", "TGA", "QOI", "PCX",
    "DDS", "PSD",
)  # fmt: skip
_BUILT_WITH = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
# Pictures all the same: a set that holds them is smaller than its owner thinks.
_PICTURES = frozenset((
    "heic", "heif", "heics", "heifs", "hif", "avci", "jxl", "jxr", "wdp", "hdp", "bpg", "flif", "exr", "hdr", "svg", "svgz",
    "eps", "wmf", "emf", "xcf", "ai", "dng", "cr2", "cr3", "crw", "nef", "nrw", "arw", "srf", "sr2", "orf", "rw2", "raf", "pef",
    "srw", "x3f", "3fr", "iiq", "mrw", "kdc", "dcr", "erf", "mef", "mos",
    "webp", "avif", "avifs", "jp2", "j2k", "jpc", "jpf", "jpx", "j2c",  # read where Pillow was built with them
))  # fmt: skip

_by_extension = Image.registered_extensions()  # loads all plug-ins
FORMATS = tuple(
    name
    for name in _CANDIDATES
    if name in Image.OPEN and (name not in _BUILT_WITH or features.check(_BUILT_WITH[name]))
)
"""Pillow's names of the formats that are opened."""
IMAGE_EXTENSIONS = frozenset(
    extension[1:] for extension, name in _by_extension.items() if name in FORMATS or name == "MPO"
)
"""Extensions, in lower case and without the dot, of the files that are read as images."""
UNREAD_PICTURES = _PICTURES - IMAGE_EXTENSIONS
"""Extensions of pictures that cannot be read here; they are always counted and reported."""


def extension_of(name: str) -> str:
    """The part of a file's name after its last dot, in lower case; empty without one."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""


def cause_of(extension: str) -> str:
    """The name under which a file that is not read as an image is counted."""
    return f"unreadable_{extension}" if extension in UNREAD_PICTURES else "not_an_image"
