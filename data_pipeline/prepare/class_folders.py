"""Class folders without a readable image, such as one of HEIC files: a class that would be lost silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.formats import UNREAD_PICTURES


def check_no_class_is_lost(path: Path, classes: set[str], others: Mapping[str, Counter[str]]) -> list[str]:
    """Raise DataError for a folder under `path` that holds pictures, but none that can be read.

    `classes`: the folders with images; `others`: the other files, by folder and extension. Returns the
    folders that hold no picture at all: probably not classes, but to be reported.
    """
    for name, found in sorted(others.items()):
        pictures = {extension: count for extension, count in sorted(found.items()) if extension in UNREAD_PICTURES}
        if name not in classes and pictures:
            kinds = ", ".join(f"{count} .{extension}" for extension, count in pictures.items())
            raise DataError(
                f"the class folder {path / name} would end without a single image: {kinds} cannot be read here; convert them "
                "to PNG or JPEG, or move the folder away to leave the class out"
            )
    folders = {child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")}
    return sorted(folders - classes)
