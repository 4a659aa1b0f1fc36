"""What an unexpected file or folder is, and what to do with it: for error messages only.

By the ending, or by the first bytes where there is none. Nothing here decides what is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tarflow.data_pipeline.images.formats import IMAGE_EXTENSIONS, extension_of
from tarflow.data_pipeline.layout.names import shown
from tarflow.data_pipeline.layout.splits import split_named
from tarflow.files import open_to_read

_UNPACK = "unpack it and prepare the folder"
_COMPRESSED_TAR = "unpack it (a plain .tar can be indexed by `tarflow data index`, a folder of images prepared)"
_PARQUET = "write its images into Parquet (bytes and labels) or into class folders"
_ENDINGS = {
    ".tar": ("a tar", "tars of samples are indexed where they lie: tarflow data index"),
    ".tar.gz": ("a compressed tar", _COMPRESSED_TAR),
    ".tgz": ("a compressed tar", _COMPRESSED_TAR),
    ".tar.bz2": ("a compressed tar", _COMPRESSED_TAR),
    ".tar.xz": ("a compressed tar", _COMPRESSED_TAR),
    ".tar.zst": ("a compressed tar", _COMPRESSED_TAR),
    ".zip": ("a zip archive", _UNPACK),
    ".7z": ("a 7z archive", _UNPACK),
    ".rar": ("a rar archive", _UNPACK),
    ".csv": ("a table", "prepare the images that it lists, sorted into a folder per class"),
    ".tsv": ("a table", "prepare the images that it lists, sorted into a folder per class"),
    ".json": ("a JSON file", "prepare the folder of the images that it describes"),
    ".jsonl": ("a JSON file", "prepare the folder of the images that it describes"),
    ".h5": ("an HDF5 file", f"{_PARQUET}, or np.savez its arrays as `images` and `labels`"),
    ".hdf5": ("an HDF5 file", f"{_PARQUET}, or np.savez its arrays as `images` and `labels`"),
    ".mdb": ("an LMDB database", _PARQUET),
    ".lmdb": ("an LMDB database", _PARQUET),
    ".tfrecord": ("a TFRecord file", _PARQUET),
    ".tfrecords": ("a TFRecord file", _PARQUET),
    ".arrow": ("an Arrow file, as `save_to_disk` of datasets writes it", "export it: load_from_disk(...).to_parquet(...)"),
    ".mds": ("an MDS shard", "index the folder of its index.json: tarflow data index"),
    ".npy": ("a single array", "np.savez it as `images`, with `labels` beside it where there are any"),
    ".mat": ("a MATLAB file", "np.savez its arrays as `images` and `labels`"),
    ".pkl": ("a pickle, which could run any code when opened", "np.savez its arrays as `images` and `labels`"),
    ".pickle": ("a pickle, which could run any code when opened", "np.savez its arrays as `images` and `labels`"),
    ".pt": ("a file of torch", "np.savez its tensors as `images` and `labels`"),
    ".pth": ("a file of torch", "np.savez its tensors as `images` and `labels`"),
    ".bin": ("raw bytes", "np.savez its arrays as `images` and `labels`"),
    ".parquet": ("a Parquet file", "tarflow data prepare reads it"),
    ".npz": ("a file of arrays", "tarflow data prepare reads it"),
}  # fmt: skip
_BYTES = {
    b"\x89HDF\r\n\x1a\n": ".h5", b"PK\x03\x04": ".zip", b"\x1f\x8b": ".tar.gz", b"BZh": ".tar.bz2", b"\xfd7zXZ": ".tar.xz",
    b"\x28\xb5\x2f\xfd": ".tar.zst", b"\x93NUMPY": ".npy", b"ARROW1": ".arrow", b"PAR1": ".parquet", b"Rar!": ".rar",
    b"7z\xbc\xaf": ".7z", b"\x80\x02": ".pkl", b"\x80\x03": ".pkl", b"\x80\x04": ".pkl", b"\x80\x05": ".pkl",
}  # fmt: skip
_SIDE_FILES = (".json", ".jsonl", ".csv", ".tsv")  # often lie beside data of another kind
_LOOKED_AT = 10_000  # files of a folder: enough to know what it holds


def what_file(path: Path) -> str | None:
    """What the file is and what to do (`a zip archive: unpack it ...`); None for an unknown kind."""
    if extension_of(path.name) in IMAGE_EXTENSIONS:
        return "a single image: name the folder that holds the images"
    kind = _kind(path)
    return f"{_ENDINGS[kind][0]}: {_ENDINGS[kind][1]}" if kind else None


def what_folder(path: Path) -> str | None:
    """What a folder that was not as expected holds, and what to do: tars come first, else the most frequent kind."""
    if (path / "index" / "shards.parquet").is_file():
        return f"{shown(path)} is a prepared and indexed data set already: train on it with data.train={shown(path)}"
    if (path / "index.json").is_file():
        return f"{shown(path)} is an MDS set: tarflow data index {shown(path)}"
    try:
        below = sorted(child for child in path.iterdir() if child.is_dir())
        indexed = [child.name for child in below if (child / "index" / "shards.parquet").is_file()]
        mds = [child.name for child in below if (child / "index.json").is_file()]
        counts = Counter(kind for file in islice(_files(path), _LOOKED_AT) if (kind := _kind(file, images=True)))
    except OSError:
        return None
    if indexed:
        return f"{shown(path)} holds the prepared data sets {_listed(indexed)}: train on one of them"
    if mds:
        return f"{shown(path)} holds the MDS sets {_listed(mds)}: index each, e.g. tarflow data index {shown(path / mds[0])}"
    if not counts:
        return None
    # Tars, however few, are what somebody meant; side files only count where there is nothing else.
    kind, count = max(counts.items(), key=lambda found: (found[0] == ".tar", found[0] not in _SIDE_FILES, found[1]))
    if kind == "image":
        return f"{shown(path)} holds {count} images: tarflow data prepare {shown(path)} OUT --size PIXELS makes shards of them"
    if kind == ".tar":
        return f"{shown(path)} holds {count} tars: tarflow data index {shown(path)}"
    what, advice = _ENDINGS[kind]
    return f"{shown(path)} holds {count} {kind} file{'s' * (count > 1)}, {'each ' * (count > 1)}{what}: {advice}"


def _listed(names: list[str]) -> str:
    ordered = sorted(names, key=lambda name: (split_named(name) is None, name))
    return ", ".join(map(shown, ordered[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _files(folder: Path) -> Iterator[Path]:
    """Files in the folder and two levels below, for a glance."""
    for pattern in ("*", "*/*", "*/*/*"):
        yield from (path for path in folder.glob(pattern) if path.is_file())


def _kind(path: Path, *, images: bool = False) -> str | None:
    name = path.name.lower()
    if images and extension_of(path.name) in IMAGE_EXTENSIONS:
        return "image"
    for ending in sorted(_ENDINGS, key=len, reverse=True):
        if name.endswith(ending):
            return ending
    if ".tfrecord" in name:  # name.tfrecord-00000-of-00010
        return ".tfrecord"
    if path.suffix:
        return None
    try:
        with open_to_read(path) as file:
            head = file.read(8)
    except OSError:
        return None
    return next((ending for magic, ending in _BYTES.items() if head.startswith(magic)), None)
