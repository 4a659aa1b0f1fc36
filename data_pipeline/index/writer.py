"""Write the files of an index: samples in parts, one row group per shard, and the list of shards that describes them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Self

import numpy as np

from tarflow.data_pipeline.index.content import ShardContent, content_of
from tarflow.data_pipeline.index.index import FORMAT_VERSION, PART_KEY, SHARDS_PER_PART, Index
from tarflow.data_pipeline.index.samples import Rules, Samples
from tarflow.data_pipeline.index.shard_list import META_KEY, NO_LABEL, SHARD_FIELDS, sealed
from tarflow.files import replace_dir
from tarflow.image_size import shown

_DIGEST = 32  # hex digits of a SHA-256 that are kept


class IndexWriter:
    """Writes `root/index` shard by shard; to be used in a `with` block.

    Everything goes into `root/index.partial`, which `finish` puts in place in one step. A block that ends without it leaves an
    older index as it was.
    """

    def __init__(
        self, root: Path, classes: list[str] | None, image_size: tuple[int, int] | None = None, crop: str | None = None
    ) -> None:
        self.root = root
        self.classes = classes
        self.image_size, self.crop = image_size, crop
        self._resolved_root = root.resolve()
        self._folder = root / "index.partial"
        self._parts = _Parts(self._folder)
        self._shards: dict[str, list[Any]] = {name: [] for name in SHARD_FIELDS}
        self._fingerprint = hashlib.sha256(json.dumps([FORMAT_VERSION, classes]).encode())
        self._fingerprint_of_places = self._fingerprint.copy()

    def __enter__(self) -> Self:
        shutil.rmtree(self._folder, ignore_errors=True)  # left by a killed run
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._parts.close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, path: Path, content: ShardContent, samples: Samples) -> None:
        """Write the samples of the next shard."""
        name = os.path.relpath(path.resolve(), self._resolved_root)
        # Two fingerprints: version 0.1 knew nothing of contents, and its runs resume by the one of places.
        places = _digest_of_places(name, content.file_bytes, samples)
        self._fingerprint_of_places.update(places.encode())
        digest = hashlib.sha256(f"{places}\0{content.checksum}".encode()).hexdigest()[:_DIGEST]
        self._fingerprint.update(digest.encode())

        rows = len(samples.keys)
        number = len(self._shards["path"])
        part, row_group = self._parts.write(_table(number, samples, self.image_size), digest) if rows else (-1, -1)
        labels = [label for label in samples.labels if label is not None]
        row = {
            "path": name, "samples": rows, "bytes": content.file_bytes, "part": part, "row_group": row_group,
            "labelled": len(labels), "label_min": min(labels, default=None), "label_max": max(labels, default=None),
            "digest": digest, "modified_ns": content.modified_ns, "checksum": content.checksum, "sketch": content.sketch,
        }  # fmt: skip
        for column, value in row.items():
            self._shards[column].append(value)

    def take_over(self, older: Index) -> list[str]:
        """Record the size and the crop rule that an older index records: shards themselves say nothing of them.

        Only where all shards with samples are among its own; else nothing is recorded, and the line says so. No line without
        a loss.
        """
        if self.image_size or self.crop or not (older.image_size or older.crop):
            return []
        theirs = {content.checksum for k in range(len(older.shard_paths)) if (content := older.shard_content(k))}
        mine = {checksum for checksum, rows in zip(self._shards["checksum"], self._shards["samples"]) if rows}
        if mine <= theirs:
            self.image_size, self.crop = older.image_size, older.crop
            return []
        size = f"all images are {shown(older.image_size[::-1])}" if older.image_size else ""
        rule = f"cropped by the rule {older.crop}" if older.crop else ""
        return [
            f"the index before said: {', '.join(filter(None, (size, rule)))}; of these shards that is not known, so "
            "data.crop has to say the rule where it matters"
        ]

    def finish(self, form: str, rules: Rules, origin: list[str]) -> None:
        """Write the list of shards and put the index in place.

        `form`: what the shards are, `tar` or `mds`. `rules`: how the samples were found, for `data verify`. `origin`: lines
        about where the data came from and what was inferred.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._parts.close()
        contents = [content_of(path) for path in self._parts.paths]
        meta = {
            "format_version": FORMAT_VERSION,
            "classes": self.classes,
            "fingerprint": self._fingerprint.hexdigest()[:_DIGEST],
            "fingerprint_of_places": self._fingerprint_of_places.hexdigest()[:_DIGEST],
            "image_size": self.image_size,
            **({"crop": self.crop} if self.crop else {}),
            "form": form,
            "label_field": rules.label_field,
            "image_field": rules.image_field,
            "origin": origin,
            "part_digests": self._parts.digests,
            "part_bytes": [content.file_bytes for content in contents],
            "part_checksums": [content.checksum for content in contents],
        }
        schema = pa.schema(list(SHARD_FIELDS.items())).with_metadata({META_KEY: json.dumps(sealed(meta)).encode()})
        table = pa.table(self._shards, schema=schema)
        pq.write_table(table, self._folder / "shards.parquet", write_page_checksum=True)
        replace_dir(self._folder, self.root / "index")


class _Parts:
    """The files of samples, at most SHARDS_PER_PART shards in each.

    A part carries a digest of its shards' digests in its own metadata, and the list of shards carries it, too: a part of
    another state of the index is noticed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []
        self.digests: list[str] = []
        self._writer: Any = None
        self._digest = hashlib.sha256()
        self._row_groups = 0

    def write(self, table: Any, digest: str) -> tuple[int, int]:
        """Append the samples of a shard; (part, row group) of it."""
        import pyarrow.parquet as pq

        if self._writer is None:
            self.paths.append(self.folder / f"samples-{len(self.paths):05d}.parquet")
            self._writer = pq.ParquetWriter(self.paths[-1], table.schema, compression="zstd", write_page_checksum=True)
        place = len(self.paths) - 1, self._row_groups
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._digest.update(digest.encode())
        self._row_groups += 1
        if self._row_groups == SHARDS_PER_PART:
            self.close()
        return place

    def close(self) -> None:
        """Complete the open part, if there is one."""
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        self.digests.append(self._digest.hexdigest()[:_DIGEST])
        writer.add_key_value_metadata({PART_KEY: self.digests[-1].encode()})
        writer.close()
        self._digest, self._row_groups = hashlib.sha256(), 0


def _table(shard: int, samples: Samples, image_size: tuple[int, int] | None) -> Any:
    """The rows of one shard as a pyarrow table."""
    import pyarrow as pa

    rows = len(samples.keys)
    width, height = image_size or (samples.widths, samples.heights)
    columns = {
        "shard": pa.array([shard] * rows, pa.int32()),
        "key": pa.array(samples.keys, pa.string()),
        "offset": pa.array(samples.offsets, pa.int64()),
        "size": pa.array(samples.sizes, pa.int64()),
        "ext": _extensions(samples.extensions),
        "label": pa.array(samples.labels, pa.int64()),
        "width": _side(width, rows),
        "height": _side(height, rows),
    }
    return pa.table(columns)


def _extensions(values: list[str]) -> Any:
    """A dictionary column; nearly always of one value, which needs no look at each row."""
    import pyarrow as pa

    names = list(dict.fromkeys(values))
    if len(names) == 1:
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(values), dtype=np.int32)), pa.array(names))
    return pa.array(values, pa.string()).dictionary_encode()


def _side(lengths: int | list[int | None] | None, rows: int) -> Any:
    """A column of widths or heights in pixels: one for all, one each, or nulls where they are unknown."""
    import pyarrow as pa

    if isinstance(lengths, int):
        return pa.array(np.full(rows, lengths, dtype=np.int32))
    return pa.nulls(rows, pa.int32()) if lengths is None else pa.array(lengths, pa.int32())


def _digest_of_places(name: str, file_bytes: int, samples: Samples) -> str:
    """Digest of the name of a shard and of the places, sizes and labels of its samples, not of their contents."""
    digest = hashlib.sha256(f"{name}\0{file_bytes}\0".encode())
    digest.update("\0".join(samples.keys).encode())
    labels = [NO_LABEL if label is None else label for label in samples.labels]
    digest.update(np.array([samples.offsets, samples.sizes, labels], dtype="<i8").tobytes())
    return digest.hexdigest()[:_DIGEST]
