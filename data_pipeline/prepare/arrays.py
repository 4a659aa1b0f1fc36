"""Arrays of pixels: `.npz` as numpy, Keras, MedMNIST and ADM publish them, and IDX files (MNIST and its relatives)."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.layout.names import shown
from tarflow.data_pipeline.layout.splits import ALL, SPLITS, by_split, chosen, split_of
from tarflow.data_pipeline.prepare.labels import array_labels, number_labels
from tarflow.data_pipeline.prepare.source import (
    Choices,
    ImageSource,
    asked_name,
    files_note,
    first_of,
    split_note,
    split_numbers,
)  # fmt: skip
from tarflow.errors import why
from tarflow.files import open_to_read
from tarflow.npz import declared, read_npz
from tarflow.records import SEAL, DamagedFileError

_IMAGE_ARRAYS = ("images", "image", "x", "data", "arr_0")
_IDX_HEAD = 20  # bytes of the longest header
MAX_ARRAY = 64 << 30  # bytes of an array of pixels: it is held in memory
_LABEL_ARRAYS = ("labels", "label", "y", "targets", "arr_1")


def npz_source(path: Path, choices: Choices | None = None) -> ImageSource:
    """uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W] with C in 1, 3, 4, and optional labels.

    Labels are integers, names or one-hot rows. Arrays such as `x_train` and `x_test` are splits.
    """
    choices = choices or Choices()
    try:
        names = [name for name in declared(path, MAX_ARRAY) if name != SEAL]
        pairs = _pairs(path, names, choices)
        arrays = read_npz(path, MAX_ARRAY, {name for pair in pairs.values() for name in pair if name}).arrays
    except DamagedFileError as err:
        raise DataError(f"cannot read {shown(path)} as .npz: {err.problem}") from None
    except OSError as err:
        raise DataError(f"cannot read {shown(path)}: {err.strerror or err}") from None
    # The splits one after the other; each image array has as many labels as images, or none.
    images, values, notes = [], [], []
    for image, label in pairs.values():
        pixels, raw = arrays[image], arrays[label] if label else None
        images.append(_check_images(pixels, f"array {image!r} of {shown(path)}"))
        notes.append(f"images: array {image!r}; labels: {f'array {label!r}' if label else 'none'}")
        if raw is None:
            values += [None] * len(images[-1])
            continue
        count = len(raw) if raw.ndim else 1
        if count != len(images[-1]):
            raise DataError(
                f"{shown(path)} holds {len(images[-1])} images but {count} labels (arrays {image!r}, {label!r})"
            )
        found, note = array_labels(raw, f"array {label!r} of {shown(path)}")
        values += found
        notes += [note] if note else []
    # Report what was left aside, and refuse what only some splits have.
    used = {name for pair in pairs.values() for name in pair}
    unused = [name for name in names if name not in used]
    if unused:
        notes.append(f"arrays not used: {', '.join(map(shown, unused[:12]))}{' ...' * (len(unused) > 12)}")
    labelled = {split: label is not None for split, (_, label) in pairs.items()}
    if len(set(labelled.values())) > 1:
        bare = ", ".join(split for split, has in labelled.items() if not has)
        raise DataError(
            f"{shown(path)} has no labels for the split {bare}, the others have: take some splits with --split, or give "
            "--labels none"
        )
    where = [f"{shown(path)} {image}" if split else shown(path) for split, (image, _) in pairs.items()]
    return _of_arrays([*pairs], images, values, f"labels of {shown(path)}", where, notes, "array name", choices)


def _pairs(path: Path, names: list[str], choices: Choices) -> dict[str, tuple[str, str | None]]:
    """Split -> (its image array, its label array)."""
    stems: dict[str, dict[str, str]] = {}  # split -> name without the split -> array
    for name in names:
        split = split_of(Path(name)) or ""
        words = [word for word in re.split(r"[^A-Za-z0-9]+", name) if split_of(Path(word)) is None] if split else [name]
        stems.setdefault(split, {})["_".join(words)] = name
    if choices.image_column is not None:
        image = str(asked_name("array", choices.image_column, names, path, "--image-column"))
        mine = next(group for group in stems.values() if image in group.values())
        return {"": (image, _label_array(path, names, mine, choices))}
    images = {split: group[known] for split, group in stems.items() if (known := first_of(_IMAGE_ARRAYS, [*group]))}
    found = [split for split in (*SPLITS, "") if split in images]
    if len(found) > 1 and "" in found:
        found.remove("")  # x beside x_train: the splits are what was published; x is reported as not used
    if not found:
        raise DataError(
            f"cannot tell which array of {shown(path)} holds the images: name it with --image-column ({', '.join(names)})"
        )
    wanted = chosen(found, choices.split, shown(path))
    if wanted == [ALL]:
        wanted = found
    if len(wanted) > 1 and choices.label_column is not None:
        raise DataError(
            f"{shown(path)} holds the splits {', '.join(wanted)}, --label-column names one array: add --split {wanted[0]}"
        )
    return {split: (images[split], _label_array(path, names, stems[split], choices)) for split in wanted}


def _label_array(path: Path, names: list[str], group: dict[str, str], choices: Choices) -> str | None:
    if choices.labels == "none":
        return None
    if choices.label_column is not None:
        return asked_name("array", choices.label_column, names, path, "--label-column")
    known = first_of(_LABEL_ARRAYS, [*group])
    return group[known] if known else None


def idx_source(files: Path | Sequence[Path], choices: Choices | None = None) -> ImageSource:
    """IDX image files (gzipped or not) with the label files beside them, where there are any (`images` -> `labels`).

    Several files are splits of one set by their names (`train-...`, `t10k-...`).
    """
    choices = choices or Choices()
    several = [files] if isinstance(files, Path) else list(files)
    root = several[0].parent
    groups = by_split(several, root)
    crowded = [members for members in groups.values() if len(members) > 1]
    if crowded:
        raise DataError(
            f"{shown(root)} holds several IDX image files ({', '.join(p.name for p in crowded[0])}): name one of them"
        )
    wanted = chosen([*groups], choices.split, shown(root)) if len(several) > 1 or choices.split else [*groups]
    if wanted == [ALL]:
        wanted = [*groups]
    # Each file with the labels beside it; a split is one file.
    images, values, notes, paths = [], [], [], {}
    for split in wanted:
        (path,) = groups[split]
        paths[split] = path
        pixels = read_idx(path)
        if pixels.ndim not in (3, 4):
            raise DataError(f"{shown(path)} has {pixels.ndim} dimensions, expected images")
        images.append(_check_images(pixels, shown(path)))
        beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        if choices.labels == "none" or beside == path or not beside.is_file():
            values += [None] * len(pixels)
            notes.append(
                f"labels of {path.name}: none" + ("" if choices.labels == "none" else f" (no {beside.name} beside it)")
            )
            continue
        raw = read_idx(beside)
        if raw.shape != (len(pixels),):
            raise DataError(f"{shown(beside)} holds {raw.shape} labels for {len(pixels)} images in {shown(path)}")
        values += raw.tolist()
        notes.append(f"labels of {path.name}: {beside.name}")
    notes.insert(0, files_note([*paths.values()], root))
    where = [shown(path) for path in paths.values()]
    return _of_arrays(wanted, images, values, f"labels of {shown(root)}", where, notes, "file name", choices)


def _of_arrays(
    splits: Sequence[str],
    images: list[NDArray[np.uint8]],
    values: list[Any],
    labels_where: str,
    where: list[str],
    notes: list[str],
    how: str,
    choices: Choices,
) -> ImageSource:
    """A source of several arrays, one for each split. `where`: where each came from; `how`: how the splits were found."""
    # The arrays stay apart (they may be memory maps): an image is looked up by its place, and nothing is copied together.
    starts = np.concatenate([[0], np.cumsum([len(part) for part in images])])

    def place(i: int) -> tuple[int, int]:
        part = int(np.searchsorted(starts, i, side="right")) - 1
        return part, i - int(starts[part])

    def read(i: int) -> NDArray[np.uint8]:
        part, row = place(i)
        return np.asarray(images[part][row])

    def called(i: int) -> str:
        part, row = place(i)
        return f"{where[part]} image {row}"

    labels, classes, named = np.full(len(values), -1, dtype=np.int64), None, False
    if any(value is not None for value in values):
        labels, classes, named = number_labels(values, labels_where)
    sizes = {split: len(part) for split, part in zip(splits, images)}
    found = split_note(how, sizes) if len(sizes) > 1 else []
    return ImageSource(
        labels,
        classes,
        read,
        called,
        named=named,
        pixels=True,
        splits=split_numbers(sizes, choices),
        notes=found + notes,
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes, gzipped or not, as an array. Raises DataError for anything else, and if it is cut."""
    try:
        with open_to_read(path) as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if packed else file
            data = stream.read(_IDX_HEAD)
            promised = _promised(data)
            if promised > MAX_ARRAY:
                raise DataError(f"{shown(path)} promises {promised:,} bytes, at most {MAX_ARRAY:,} are read")
            data += stream.read(max(0, promised - len(data) + 1))  # one byte more shows that the file is too long
    except (OSError, EOFError, zlib.error) as err:
        raise DataError(f"cannot read {shown(path)}: {why(err)}") from None
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or not 1 <= data[3] <= 4:
        raise DataError(f"{shown(path)} is not an IDX file of unsigned bytes (it starts with {data[:4].hex()})")
    if len(data) != promised:
        raise DataError(
            f"{shown(path)} is {'cut' if len(data) < promised else 'too long'}: its header promises {promised:,} bytes, it "
            f"holds {len(data):,}{' or more' * (len(data) > promised)}"
        )
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _promised(head: bytes) -> int:
    """Bytes of the IDX file that begins with `head`; 0 if it is not one."""
    if len(head) < 4 or len(head) < 4 + 4 * head[3] or not 1 <= head[3] <= 4:
        return 0
    return 4 + 4 * head[3] + math.prod(struct.unpack_from(f">{head[3]}I", head, 4))


def _check_images(images: NDArray[Any], where: str) -> NDArray[np.uint8]:
    if images.dtype != np.uint8:
        raise DataError(f"{where} is {images.dtype}, expected uint8 pixels 0..255")
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and images.shape[3] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[3] not in (1, 3, 4) or 0 in images.shape:
        rows = "; rows of pixels are read from files called train_data_batch_N.npz and val_data.npz" * (
            images.ndim == 2
        )
        raise DataError(f"{where} has shape {images.shape}, expected [N, H, W], [N, H, W, C] or [N, C, H, W]{rows}")
    return images
