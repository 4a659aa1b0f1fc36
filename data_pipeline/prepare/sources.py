"""What `data prepare` reads: folders of class folders, Parquet with image bytes, `.npz` arrays, IDX files.

Every source gives its images in any order by number: `labels` (int64 [n], -1 = none) and `classes` are known at once,
pixels or file bytes are read one by one. `runs` says which numbers lie together, so that a shuffle can stay cheap.
"""

from __future__ import annotations

import gzip
import struct
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.formats import IMAGE_EXTENSIONS, cause_of, extension_of
from tarflow.data_pipeline.index.labels import MAX_CLASSES
from tarflow.data_pipeline.prepare.class_folders import check_no_class_is_lost

WINDOW_BYTES = 1 << 30
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "bytes", "image_bytes", "data")
_LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "target", "y")
_IMAGE_ARRAYS = ("images", "image", "x", "x_train", "data", "arr_0")
_LABEL_ARRAYS = ("labels", "label", "y", "y_train", "targets", "arr_1")


@dataclass
class ImageSource:
    """Images to prepare: `read(i)` gives a file (bytes) or pixels (uint8 [H, W, C]), `name(i)` is for messages.

    `labels`: int64 [n], -1 = no label. `runs`: (images, bytes) of stretches that are read as a whole, in order; None
    where any order of reading is cheap.
    """

    labels: np.ndarray
    classes: list[str] | None
    read: Callable[[int], bytes | np.ndarray]
    name: Callable[[int], str]
    runs: list[tuple[int, int]] | None = None
    ignored: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.labels)


def open_source(path: Path, *, image_column: str | None = None, label_column: str | None = None) -> ImageSource:
    """Recognise what lies at `path` and open it. Raises DataError when it is none of the four, or empty."""
    if not path.exists():
        raise DataError(f"there is nothing at {path}")
    if path.is_dir():
        if any(path.glob("*.parquet")):
            return parquet_source(sorted(path.glob("*.parquet")), image_column, label_column)
        idx = sorted(p for p in path.iterdir() if "idx3-ubyte" in p.name.replace(".", "-"))
        if idx:
            if len(idx) > 1:
                names = ", ".join(p.name for p in idx)
                raise DataError(f"{path} holds several IDX image files ({names}): name one of them")
            return idx_source(idx[0])
        return folder_source(path)
    if path.suffix == ".parquet":
        return parquet_source([path], image_column, label_column)
    if path.suffix == ".npz":
        return npz_source(path, image_column, label_column)
    if "idx3" in path.name:
        return idx_source(path)
    raise DataError(
        f"cannot tell what {path} is: expected a folder of class folders, a .parquet or .npz file, "
        "or an IDX file named ...idx3-ubyte(.gz)"
    )


def folder_source(path: Path) -> ImageSource:
    """One class per folder directly under `path`, named after it; folders below belong to their class.

    A folder without subfolders is a data set without labels. Hidden and non-image files are ignored and counted; the
    extension's case does not matter. Raises DataError for an empty folder and for images beside class folders.
    """
    ignored: Counter[str] = Counter()
    loose: list[Path] = []
    by_class: dict[str, list[Path]] = {}
    without: dict[str, Counter[str]] = {}  # what else lies in a class folder, by extension
    for file in sorted(path.rglob("*")):
        if file.is_dir():
            continue
        relative = file.relative_to(path)
        if any(part.startswith(".") for part in relative.parts):
            ignored["hidden"] += 1
        elif (extension := extension_of(file.name)) not in IMAGE_EXTENSIONS:
            ignored[cause_of(extension)] += 1
            if len(relative.parts) > 1:
                without.setdefault(relative.parts[0], Counter())[extension] += 1
        elif len(relative.parts) == 1:
            loose.append(file)
        else:
            by_class.setdefault(relative.parts[0], []).append(file)
    if by_class:
        for name in check_no_class_is_lost(path, set(by_class), without):
            ignored[f"folder without images {name!r}"] += 1
    if not loose and not by_class:
        seen = f" ({', '.join(f'{cause} {count}' for cause, count in sorted(ignored.items()))})" if ignored else ""
        raise DataError(f"folder {path} holds no images{seen}: expected class folders with {_some_extensions()} files")
    if loose and by_class:
        raise DataError(
            f"{path} holds {len(loose)} images beside {len(by_class)} class folders (first: {loose[0].name}): "
            "move them into a class folder, or prepare a folder without subfolders for data without labels"
        )
    classes = sorted(by_class) if by_class else None
    files = loose or [file for name in sorted(by_class) for file in by_class[name]]
    labels = np.full(len(files), -1, dtype=np.int64)
    if classes:
        labels = np.repeat(np.arange(len(classes)), [len(by_class[name]) for name in classes])
    return ImageSource(labels, classes, lambda i: files[i].read_bytes(), lambda i: str(files[i]), ignored=ignored)


def _some_extensions() -> str:
    return ".jpg, .png, .webp"


def parquet_source(files: Sequence[Path], image_column: str | None, label_column: str | None) -> ImageSource:
    """Image bytes in a binary column, or a struct column with a `bytes` field; labels as integers or names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    handles = []
    for file in files:
        try:
            handles.append(pq.ParquetFile(file))
        except (OSError, pa.ArrowException) as err:
            raise DataError(f"cannot read {file} as Parquet: {err}") from None
    schema = handles[0].schema_arrow
    image = _pick("column", image_column, _IMAGE_COLUMNS, schema.names, files[0], "--image-column", required=True)
    label = _pick("column", label_column, _LABEL_COLUMNS, schema.names, files[0], "--label-column", required=False)
    kind = schema.field(image).type
    if not (_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
        raise DataError(f"column {image!r} of {files[0]} is {kind}, expected image bytes (--image-column)")
    runs: list[tuple[int, int]] = []
    places: list[tuple[Any, int, Path]] = []
    found: list[Any] = []
    for handle, file in zip(handles, files):
        for group in range(handle.num_row_groups):
            info = handle.metadata.row_group(group)
            runs.append((info.num_rows, info.total_byte_size))
            places.append((handle, group, file))
        if label:
            found += handle.read(columns=[label])[label].to_pylist()
    total = sum(rows for rows, _ in runs)
    if total == 0:
        raise DataError(f"{files[0]} holds no rows")
    labels, classes = _number_labels(found, f"column {label!r} of {files[0]}") if label else (np.full(total, -1), None)
    starts = np.concatenate([[0], np.cumsum([rows for rows, _ in runs])])
    cache: dict[int, Any] = {}
    lock = threading.Lock()

    def read(i: int) -> bytes:
        group = int(np.searchsorted(starts, i, side="right")) - 1
        with lock:  # called from several threads
            if group not in cache:
                # The shuffle works through windows of WINDOW_BYTES, so this much is asked for again and again.
                while cache and sum(runs[kept][1] for kept in cache) > 2 * WINDOW_BYTES:
                    cache.pop(next(iter(cache)))
                handle, number, _ = places[group]
                cache[group] = handle.read_row_group(number, columns=[image])[image]
            column = cache[group]
        value = column[i - int(starts[group])].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        return value or b""

    def name(i: int) -> str:
        group = int(np.searchsorted(starts, i, side="right")) - 1
        return f"{places[group][2]} row {i}"

    return ImageSource(labels, classes, read, name, runs=runs)


def _binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def npz_source(path: Path, image_array: str | None = None, label_array: str | None = None) -> ImageSource:
    """uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W] with C in 1, 3, 4, and optional integer or string labels."""
    try:
        arrays = np.load(path, allow_pickle=False)
        names = list(arrays.files)
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as err:
        raise DataError(f"cannot read {path} as .npz: {err}") from None
    image = _pick("array", image_array, _IMAGE_ARRAYS, names, path, "--image-column", required=True)
    label = _pick("array", label_array, _LABEL_ARRAYS, names, path, "--label-column", required=False)
    try:
        images = arrays[image]
        raw = arrays[label] if label else None
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as err:
        raise DataError(f"cannot read {path}: {err}") from None
    images = _check_images(images, f"array {image!r} of {path}")
    labels, classes = np.full(len(images), -1), None
    if raw is not None:
        if len(raw) != len(images):
            raise DataError(f"{path} holds {len(images)} images but {len(raw)} labels")
        labels, classes = _number_labels(raw.reshape(len(raw), -1)[:, 0].tolist(), f"array {label!r} of {path}")
    return ImageSource(labels, classes, lambda i: images[i], lambda i: f"{path} image {i}")


def idx_source(path: Path, labels_path: Path | None = None) -> ImageSource:
    """An IDX image file (gzipped or not) with the label file beside it, if there is one (`images` -> `labels`)."""
    images = read_idx(path)
    if images.ndim not in (3, 4):
        raise DataError(f"{path} has {images.ndim} dimensions, expected images")
    images = _check_images(images, str(path))
    if labels_path is None:
        beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        labels_path = beside if beside != path and beside.is_file() else None
    labels, classes = np.full(len(images), -1), None
    if labels_path is not None:
        raw = read_idx(labels_path)
        if raw.shape != (len(images),):
            raise DataError(f"{labels_path} holds {raw.shape} labels for {len(images)} images in {path}")
        labels, classes = _number_labels(raw.tolist(), str(labels_path))
    return ImageSource(labels, classes, lambda i: images[i], lambda i: f"{path} image {i}")


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped or not, as an array. Raises DataError when it is none or cut short."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as err:
        raise DataError(f"cannot read {path}: {err}") from None
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or not 1 <= data[3] <= 4:
        raise DataError(f"{path} is no IDX file of unsigned bytes (it starts with {data[:4].hex()})")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    body = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3])
    if body.size != int(np.prod(shape)):
        raise DataError(f"{path} is cut: its header promises {shape}, it holds {body.size} bytes")
    return body.reshape(shape)


def _check_images(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype != np.uint8:
        raise DataError(f"{where} is {images.dtype}, expected uint8 pixels 0..255")
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and images.shape[3] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[3] not in (1, 3, 4) or 0 in images.shape:
        raise DataError(f"{where} has shape {images.shape}, expected [N, H, W], [N, H, W, C] or [N, C, H, W]")
    return images


def _number_labels(values: list[Any], where: str) -> tuple[np.ndarray, list[str]]:
    """Integers keep their value and are named by it; names are numbered in sorted order. None = no label."""
    present = [value for value in values if value is not None]
    if all(isinstance(value, int) and not isinstance(value, bool) for value in present):
        if present and min(present) < 0:
            raise DataError(f"{where} holds the label {min(present)} (row {values.index(min(present))}): must be >= 0")
        count = max(present, default=-1) + 1
        if count > MAX_CLASSES:
            raise DataError(
                f"{where} holds the label {count - 1} (row {values.index(count - 1)}): integers must number the classes from 0 "
                f"to at most {MAX_CLASSES - 1}"
            )
        return np.array([-1 if value is None else value for value in values]), [str(i) for i in range(count)]
    if not all(isinstance(value, str) for value in present):
        odd = next(value for value in present if not isinstance(value, (int, str)) or isinstance(value, bool))
        raise DataError(f"{where} holds {odd!r}, expected integers or names")
    classes = sorted(set(present))
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([-1 if value is None else numbers[value] for value in values]), classes


def _pick(
    what: str, asked: str | None, known: Sequence[str], names: Sequence[str], path: Path, flag: str, *, required: bool
) -> str | None:
    if asked is not None:
        if asked not in names:
            raise DataError(f"{path} has no {what} {asked!r} ({flag}); it has {', '.join(names)}")
        return asked
    for name in known:
        if name in names:
            return name
    if required:
        raise DataError(
            f"cannot tell which {what} of {path} holds the images: name it with {flag} ({', '.join(names)})"
        )
    return None
