"""An index as version 0.1 wrote it, made of a new one."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tarflow.data_pipeline.index.shard_list import META_KEY


def as_version_0_1(root: Path) -> None:
    """Take out of `root`/index what that version did not know: checksums, seals, sketches and the fingerprint made of them."""
    path = root / "index" / "shards.parquet"
    table = pq.read_table(path)
    meta = json.loads(table.schema.metadata[META_KEY])
    meta["fingerprint"] = meta.pop("fingerprint_of_places")
    for name in ("checksum", "part_bytes", "part_checksums"):
        del meta[name]
    old: pa.Table = table.drop_columns(["modified_ns", "checksum", "sketch"])
    pq.write_table(old.replace_schema_metadata({META_KEY: json.dumps(meta).encode()}), path)
