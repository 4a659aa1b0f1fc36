"""Open what `data prepare` reads, recognised by name.

Folders of images, Parquet with image bytes, `.npz` arrays, IDX files, the official files of downsampled ImageNet.

Every source gives its images in any order by number: labels, classes and splits are known at once, pixels or file bytes
are read one by one. What was inferred is in `notes`, to be printed before the work and stored with its result.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.formats import IMAGE_EXTENSIONS, extension_of
from tarflow.data_pipeline.index.kinds import what_file, what_folder
from tarflow.data_pipeline.layout.names import shown
from tarflow.data_pipeline.layout.walk import Walk, walk
from tarflow.data_pipeline.prepare.arrays import idx_source, npz_source
from tarflow.data_pipeline.prepare.downsampled.batches import downsampled_source, is_official
from tarflow.data_pipeline.prepare.folders import folder_source
from tarflow.data_pipeline.prepare.labels import by_list, label_notes
from tarflow.data_pipeline.prepare.source import LABELS, Choices, ImageSource
from tarflow.data_pipeline.prepare.tables import parquet_source


def open_source(
    path: Path,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: str | None = None,
    split: str | None = None,
    classes: list[str] | None = None,
) -> ImageSource:
    """Recognise what lies at `path` and open it; the options are those of `source.Choices`.

    `classes`: the class names in label order; the source's classes are renumbered by their names. Raises DataError
    for anything else, for an empty source, for an option that does not apply, and where it can be read in two ways.
    """
    try:
        path.stat()
    except OSError as err:
        raise DataError(f"there is nothing at {shown(path)} ({err.strerror})") from None
    choices = Choices(image_column, label_column, labels, split)
    if labels is not None and labels not in LABELS:
        raise DataError(f"--labels cannot be {labels!r}: one of {', '.join(LABELS)}")
    if labels is not None and label_column is not None:
        raise DataError(f"--labels {labels} and --label-column {label_column} contradict each other: use one of them")
    source = _recognised(path, choices)
    if classes is not None:
        if source.classes is None:
            raise DataError(f"--classes names classes, but there are no labels at {shown(path)}")
        source.labels = by_list(source.labels, source.classes, source.named, classes, shown(path))
        source.classes, source.named = classes, True
        source.notes.append("classes: in the order of --classes")
    source.notes += label_notes(source.labels, source.classes, source.named)
    return source


def _recognised(path: Path, choices: Choices) -> ImageSource:
    if path.is_dir():
        return _folder(path, choices)
    if is_official(path):
        _only(choices, path, "a file of downsampled ImageNet", "split")
        return downsampled_source([path], path.parent, choices)
    if path.suffix == ".parquet":
        _only(choices, path, "a Parquet file", "image_column", "label_column")
        return parquet_source([path], path.parent, choices)
    if path.suffix == ".npz":
        _only(choices, path, "an .npz file", "image_column", "label_column", "split")
        return npz_source(path, choices)
    if "idx3" in path.name:
        _only(choices, path, "an IDX file")
        return idx_source(path, choices)
    what = what_file(path)
    if what:
        raise DataError(f"{shown(path)} is {what}")
    raise DataError(
        f"cannot tell what {shown(path)} is: expected a folder of class folders, a .parquet or .npz file, "
        "or an IDX file named ...idx3-ubyte(.gz)"
    )


def _folder(path: Path, choices: Choices) -> ImageSource:
    """A folder: of IDX files, of Parquet files, or of images."""
    if (path / "index" / "shards.parquet").is_file() or any(path.glob("*/index/shards.parquet")):
        raise DataError(str(what_folder(path)))
    idx = sorted(p for p in path.iterdir() if "idx3-ubyte" in p.name.replace(".", "-"))
    if idx:
        _only(choices, path, "a folder of IDX files", "split")
        return idx_source(idx, choices)
    if official := [p for p in path.iterdir() if is_official(p)]:
        _only(choices, path, "a folder of downsampled ImageNet", "split")
        return downsampled_source(official, path, choices)
    found = walk(path)
    tables = _tables(path, found)
    if tables:
        _only(choices, path, "a folder of Parquet files", "image_column", "label_column", "split")
        return parquet_source(tables, path, choices)
    _only(choices, path, "a folder of images", "split", "labels")
    return folder_source(path, choices, found)


def _tables(path: Path, found: Walk) -> list[Path]:
    """The Parquet files that hold a folder's images: those in it or, where there are no images, those below it.

    img2dataset writes one of captions and sizes beside each of its tars or folders, under the same name: not those.
    """
    here = [p for p in found.files if p.parent == path and p.suffix == ".parquet"]
    tables = [p for p in here if not p.with_suffix(".tar").exists() and not p.with_suffix("").is_dir()]
    images = sum(extension_of(p.name) in IMAGE_EXTENSIONS for p in found.files)
    if tables and images:
        raise DataError(
            f"{shown(path)} holds Parquet files (first: {shown(tables[0].name)}) and {images} images: name a Parquet file, or "
            "move them away to prepare the images"
        )
    if here or images:
        return tables
    return [p for p in found.files if p.suffix == ".parquet"]


_FLAGS: dict[str, Callable[[Choices], str | None]] = {
    "image_column": lambda choices: f"--image-column {choices.image_column}" if choices.image_column else None,
    "label_column": lambda choices: f"--label-column {choices.label_column}" if choices.label_column else None,
    "labels": lambda choices: f"--labels {choices.labels}" if choices.labels not in (None, "none") else None,
    "split": lambda choices: f"--split {choices.split}" if choices.split else None,
}


def _only(choices: Choices, path: Path, what: str, *suiting: str) -> None:
    """Raise DataError for an option that has no effect on this kind of source: it would be ignored silently."""
    for name, flag in _FLAGS.items():
        given: str | None = flag(choices)
        if given and name not in suiting:
            raise DataError(f"{given} has no effect on {what} ({shown(path)}): omit it")
