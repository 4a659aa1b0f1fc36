"""Names of members: the key and the field in them, and which fields of a sample are its image and its label."""

from __future__ import annotations

from collections.abc import Collection

from tarflow.data_pipeline.images.formats import IMAGE_EXTENSIONS

_IMAGE_EXTENSIONS = frozenset(extension.encode() for extension in IMAGE_EXTENSIONS)


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """(key, lower-case field) of a member's name, or None for hidden members and those without an extension."""
    start = name.rfind(b"/") + 1
    dot = name.find(b".", start)
    if dot <= start:
        return None
    return name[:dot], name[dot + 1 :].lower()


def text(name: bytes) -> str:
    """A name for messages and the index; bytes that are not UTF-8 are shown as escapes."""
    return name.decode("utf-8", errors="backslashreplace")


def extension_of(what: bytes) -> bytes:
    """The last part of a field: `png` of `input.png`."""
    return what.rsplit(b".", 1)[-1]


def is_image(what: bytes) -> bool:
    """Whether a field has an image extension."""
    return extension_of(what) in _IMAGE_EXTENSIONS


def image_fields(fields: Collection[bytes], wanted: bytes | None) -> list[bytes]:
    """The fields of a sample that are images: the wanted one, else those of a plain extension, else the dotted ones."""
    if wanted is not None:
        return [wanted] if wanted in fields else []
    plain = [what for what in fields if what in _IMAGE_EXTENSIONS]
    return plain or [what for what in fields if b"." in what and is_image(what)]


def label_field(fields: Collection[bytes], image: bytes, wanted: bytes) -> bytes | None:
    """The field with the label: the wanted one, else it under the image's inner dots, else it behind the image's name."""
    inner = image.rsplit(b".", 1)[0] + b"." if b"." in image else b""
    return next((what for what in (wanted, inner + wanted, image + b"." + wanted) if what in fields), None)
