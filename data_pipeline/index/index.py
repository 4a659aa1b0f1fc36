"""The Parquet index of a data set: where each sample is, read lazily, shard by shard.

    <data set>/index/shards.parquet         one row per shard; its metadata holds version, class names, fingerprint
    <data set>/index/samples-00000.parquet  one row group per shard, at most SHARDS_PER_PART shards a file

`shards.parquet` is small and read whole. Row groups of samples are read when a shard is first touched and kept in a
cache bounded by rows, so an index of 400 million samples opens at once and takes little memory.

An index may come from an untrusted source or a failing disk. Its pages and its metadata carry checksums (not in indexes of
earlier versions); row counts are checked before rows are read, and rows must match the entry of their shard in the list.
"""

from __future__ import annotations

import stat
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.content import ShardContent
from tarflow.data_pipeline.index.labels import MAX_CLASSES
from tarflow.data_pipeline.index.shard_list import MAX_BYTES, NO_LABEL, read_list
from tarflow.errors import why

FORMAT_VERSION = 1
SHARDS_PER_PART = 512
PART_KEY = b"tarflow.index"  # in a part's metadata: its digest, which the list of shards holds, too
_MAX_ROW_BYTES = 8192  # of a part: a key is a path
_TYPES = {"shard": "int32", "key": "string", "offset": "int64", "size": "int64", "label": "int64", "width": "int32",
          "height": "int32"}  # fmt: skip
_NEVER_NULL = ("shard", "key", "offset", "size")
_CACHE_ROWS = 1 << 19
_CACHE_PARTS = 8


@dataclass(frozen=True)
class Rows:
    """The samples of one shard: int64 arrays of equal length, offsets and sizes in bytes, labels NO_LABEL where absent."""

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]


class IndexFiles(Protocol):
    """Where the files of an index are read from."""

    def open(self, name: str, digest: str, most: int, checksum: str = "") -> Any:
        """A path or an open file. Raises OSError for one that is larger than allowed.

        `digest` identifies the state of the file. `most`: its size in bytes where there is a `checksum` (CRC-32, hex), else a
        bound on it.
        """


class _LocalFiles:
    def __init__(self, root: Path) -> None:
        self.folder = root / "index"

    def open(self, name: str, digest: str, most: int, checksum: str = "") -> Any:  # noqa: ARG002 -- pages are checked
        path = self.folder / name
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise OSError(f"{path} is not a regular file")
        if about.st_size > most:
            raise OSError(f"{path} has {about.st_size} bytes, at most {most} are expected")
        return path  # its pages carry checksums, so only those that are read are checked


class Index:
    """An open index. Sample ids count through the shards in `shard_paths` order.

    `root`: the data set's folder or address. `files`: where the index itself is read from, by default
    `root`/index. `num_samples`. `shard_sizes`: samples per shard, int64. `shard_bytes`: file sizes.
    `label_min`, `label_max`: int64 per shard, NO_LABEL where it has no labels. `unlabelled`: samples without a label.
    `classes`: names or None. `num_classes`: len(classes), else 1 + the largest label, else None. `fingerprint`: hex, of
    names, places, labels and contents. `fingerprint_of_places`: the same without the contents, the only one of version 0.1.
    `knows_content`: whether it holds checksums of the shards.
    `image_size`: (width, height) if all images share it, else None. `crop`: the rule by which they were cropped when they were
    prepared, where that is recorded. `form`: what the shards are, `tar` or `mds`.
    """

    def __init__(self, root: Path | str, files: IndexFiles | None = None) -> None:
        import pyarrow as pa

        self.root = root
        self._source: IndexFiles = files or _LocalFiles(Path(root))
        folder = f"{root}/index"
        try:
            meta, table = read_list(self._source.open("shards.parquet", "", MAX_BYTES))
        except DataError:  # of a fetch, which names its own cause
            raise
        except (OSError, KeyError, ValueError, MemoryError, pa.ArrowException) as err:
            raise DataError(f"cannot read {folder}: {err}; rebuild the index: tarflow data index {root}") from None
        if meta.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"the index at {folder} has format {meta.get('format_version')}, this program reads {FORMAT_VERSION}: "
                f"rebuild it: tarflow data index {root}"
            )

        # The columns of the list of shards, and what follows from them.
        self.meta = meta
        self.shard_paths: list[str] = table["path"]
        self.shard_sizes: NDArray[np.int64] = table["samples"]
        self.shard_bytes: NDArray[np.int64] = table["bytes"]
        self.shard_starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self.num_samples = int(self.shard_starts[-1])
        self.label_min: NDArray[np.int64] = table["label_min"]
        self.label_max: NDArray[np.int64] = table["label_max"]
        self._labelled: NDArray[np.int64] = table["labelled"]
        self.unlabelled = self.num_samples - int(self._labelled.sum())
        self.classes: list[str] | None = meta["classes"]
        self.fingerprint: str = meta["fingerprint"]
        self.image_size: tuple[int, int] | None = tuple(meta["image_size"]) if meta.get("image_size") else None
        self.crop: str | None = meta.get("crop")
        self.fingerprint_of_places: str = meta.get("fingerprint_of_places") or self.fingerprint
        self._digests: list[str] = table["digest"]
        self.knows_content = "checksum" in table  # not in indexes of version 0.1
        self._contents: list[tuple[int, str, str]] = []
        if self.knows_content:
            self._contents = list(zip(table["modified_ns"].tolist(), table["checksum"], table["sketch"]))

        # Where samples are read from.
        self._remote_root = "://" in str(root)
        self.any_remote = self._remote_root or any("://" in path for path in self.shard_paths)
        self.form: str = meta.get("form") or "tar"
        self._part: NDArray[np.int64] = table["part"]
        self._row_group: NDArray[np.int64] = table["row_group"]

        # Rows and open parts, the least recently used first.
        self._rows: OrderedDict[int, Rows] = OrderedDict()
        self._cached_rows = 0
        self._parts: OrderedDict[int, Any] = OrderedDict()
        self.num_classes = self._count_classes()

    def shard_place(self, shard: int) -> str:
        """Where the shard is: a path, or an address for remote data. For messages too."""
        path = self.shard_paths[shard]
        return path if "://" in path or path.startswith("/") else f"{self.root}/{path}"

    def shard_path(self, shard: int) -> Path:
        """The path of the shard. Raises DataError for a remote one."""
        if self.is_remote(shard):
            raise DataError(f"shard {self.shard_place(shard)} is remote: this needs the data set in the file system")
        return Path(self.shard_place(shard))

    def is_remote(self, shard: int) -> bool:
        """Whether the shard is read from an address."""
        return self._remote_root or "://" in self.shard_paths[shard]

    def shard_digest(self, shard: int) -> str:
        """A digest of the shard's name, places, labels and content."""
        return self._digests[shard]

    def shard_content(self, shard: int) -> ShardContent | None:
        """The state of the shard when it was indexed; None where the index is older than checksums."""
        if not self.knows_content:
            return None
        return ShardContent(int(self.shard_bytes[shard]), *self._contents[shard])

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, row in the shard) of a sample id."""
        if not 0 <= sample < self.num_samples:
            raise DataError(f"sample {sample} does not exist: the data set at {self.root} has {self.num_samples}")
        shard = int(np.searchsorted(self.shard_starts, sample, side="right")) - 1
        return shard, sample - int(self.shard_starts[shard])

    def rows(self, shard: int) -> Rows:
        """Offsets, sizes and labels of one shard, from the cache or the disk."""
        rows = self._rows.get(shard)
        if rows is not None:
            self._rows.move_to_end(shard)
            return rows
        if self.shard_sizes[shard] == 0:
            empty = np.zeros(0, dtype=np.int64)
            return Rows(empty, empty, empty)
        table = self.read(shard, ["shard", "offset", "size", "label"])
        rows = Rows(table["offset"].to_numpy(), table["size"].to_numpy(), table["label"].fill_null(NO_LABEL).to_numpy())
        self._check_rows(shard, table["shard"].to_numpy(), rows)
        self._rows[shard] = rows
        self._cached_rows += len(rows.offsets)
        while self._cached_rows > _CACHE_ROWS and len(self._rows) > 1:
            self._cached_rows -= len(self._rows.popitem(last=False)[1].offsets)
        return rows

    def read(self, shard: int, columns: list[str] | None = None) -> Any:
        """A pyarrow table with these columns (all if None) of one shard; an empty shard gives no rows."""
        import pyarrow as pa

        part, group = int(self._part[shard]), int(self._row_group[shard])
        try:
            file = self._open_part(max(part, 0))
            if part < 0:
                return file.schema_arrow.empty_table().select(columns or file.schema_arrow.names)
            rows = file.metadata.row_group(group).num_rows if group < file.metadata.num_row_groups else 0
            if rows != self.shard_sizes[shard]:
                raise ValueError(f"it has {rows} rows, the list of shards says {self.shard_sizes[shard]}")
            table = file.read_row_group(group, columns=columns, use_threads=False)
            if table.num_rows != rows or any(
                table[name].null_count for name in table.column_names if name in _NEVER_NULL
            ):
                raise ValueError(f"{table.num_rows} of {rows} rows were read, or some lack their place")
            return table
        except DataError:
            raise
        except (OSError, ValueError, KeyError, IndexError, MemoryError, pa.ArrowException) as err:
            raise self._damaged(shard, why(err)) from None

    def _damaged(self, shard: int, problem: str) -> DataError:
        return DataError(
            f"cannot read the index rows of shard {self.shard_place(shard)}: {problem}; "
            f"rebuild the index: tarflow data index {self.root}"
        )

    def _check_rows(self, shard: int, numbers: NDArray[np.int64], rows: Rows) -> None:
        """Raise DataError for rows of another shard, outside of this one, or with other labels than the list of shards says."""
        labels = rows.labels[rows.labels != NO_LABEL]
        ends = rows.offsets + rows.sizes  # negative where the sum overflows
        listed = (int(self._labelled[shard]), int(self.label_min[shard]), int(self.label_max[shard]))
        if (numbers != shard).any():
            raise self._damaged(shard, "they belong to another shard")
        if (
            (rows.offsets < 0).any()
            or (rows.sizes < 0).any()
            or (ends < 0).any()
            or (ends > self.shard_bytes[shard]).any()
        ):
            raise self._damaged(shard, f"some samples lie outside its {self.shard_bytes[shard]} bytes")
        if ((len(labels), labels.min(), labels.max()) if len(labels) else (0, NO_LABEL, NO_LABEL)) != listed:
            raise self._damaged(shard, "their labels are not those in the list of shards")

    def key(self, shard: int, row: int) -> str:
        """The key of a sample, as in the tar."""
        key = self.read(shard, ["key"])["key"][row]
        try:
            return str(key.as_py())
        except UnicodeDecodeError:
            raise self._damaged(shard, f"the key of row {row} is not text") from None

    def where(self, sample: int) -> str:
        """`shard PATH, sample KEY`, for messages."""
        shard, row = self.locate(sample)
        return f"shard {self.shard_place(shard)}, sample {self.key(shard, row)!r}"

    def _open_part(self, part: int) -> Any:
        import pyarrow.parquet as pq

        file = self._parts.get(part)
        if file is not None:
            self._parts.move_to_end(part)
            return file
        name, wanted = f"samples-{part:05d}.parquet", self.meta["part_digests"][part]
        checksums = self.meta.get("part_checksums")
        most = self.meta["part_bytes"][part] if checksums else self._max_bytes(part)
        source = self._source.open(name, wanted, most, checksums[part] if checksums else "")
        file = pq.ParquetFile(source, page_checksum_verification=True)
        digest = (file.schema_arrow.metadata or {}).get(PART_KEY) or (file.metadata.metadata or {}).get(PART_KEY)
        if digest != wanted.encode():
            path = f"{self.root}/index/{name}"
            raise OSError(f"{path} does not belong to this index: it was rewritten while in use, or only in part")
        types = {field.name: str(field.type) for field in file.schema_arrow}
        wrong = {column for column, kind in _TYPES.items() if types.get(column) != kind}
        if wrong:
            raise OSError(f"{name} has columns {types}, expected {_TYPES}")
        self._parts[part] = file
        while len(self._parts) > _CACHE_PARTS:
            self._parts.popitem(last=False)[1].close()
        return file

    def _max_bytes(self, part: int) -> int:
        """A bound on the bytes of a part, for indexes of earlier versions, which do not record them."""
        return (1 << 20) + _MAX_ROW_BYTES * int(self.shard_sizes[self._part == part].sum())

    def _refuse_label(self, label: int) -> None:
        """Raise DataError naming the sample with this label; version 0.1 had no bound on labels."""
        shard = int(np.argmax(self.label_max))
        row = int(np.argmax(self.rows(shard).labels))
        raise DataError(
            f"shard {self.shard_place(shard)}, sample {self.key(shard, row)!r}: the label is {label}, classes are numbered "
            f"from 0 to at most {MAX_CLASSES - 1}; fix it and run `tarflow data index {self.root}`, where "
            "--on-error skip leaves such samples out"
        )

    def _count_classes(self) -> int | None:
        if self.classes is not None:
            return len(self.classes)
        largest = int(self.label_max.max(initial=NO_LABEL))
        if largest >= MAX_CLASSES:
            self._refuse_label(largest)
        return largest + 1 if largest >= 0 else None
