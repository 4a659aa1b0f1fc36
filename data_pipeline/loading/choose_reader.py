"""Which reader suits what lies at a path or address.

| reader | what it reads | order and resume |
|---|---|---|
| indexed | WebDataset tars with an index, in the file system or behind an address | exact |
| mds | MDS shards (mosaicml-streaming) with an index, in either place | exact, the same order rule |
| stream | tars without an index: pipes, addresses, files | by shard, to the nearest one |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.loading.stream import stream_fingerprint, stream_shards
from tarflow.data_pipeline.storage.open_index import open_index
from tarflow.data_pipeline.storage.remote import Access, address

READERS = ("auto", "indexed", "mds", "stream")


def choose_reader(data: str | Path, reader: str) -> str:
    """`indexed` or `stream` (whether an index is of MDS shards shows when it is open). Raises DataError."""
    if reader not in READERS:
        raise DataError(f"data.reader is {reader!r}, it must be one of {', '.join(READERS)}")
    text = str(data)
    if reader == "stream":
        return "stream"
    if text.startswith("pipe:"):
        if reader != "auto":
            raise DataError(
                f"{text!r} is a pipe: it can only be read from its beginning, data.reader=stream (not {reader})"
            )
        return "stream"
    names_tars = text.endswith((".tar", ".tar.gz", ".tgz")) and not Path(text).is_dir()
    if names_tars and reader == "auto" and address(data) is not None:
        return "stream"
    if names_tars:
        raise DataError(
            f"{text!r} names tars, the {reader} reader wants the folder or address with their index: run "
            f"`tarflow data index {text!r} --out FOLDER` once; data.reader=stream reads tars without an index, by shard only"
        )
    return "indexed"


def check_form(index: Index, reader: str) -> str:
    """The reader that the open index is for, `indexed` or `mds`. Raises DataError where another one was asked for."""
    have = "mds" if index.form == "mds" else "indexed"
    if reader not in ("auto", have):
        raise DataError(
            f"the data set at {index.root} consists of {index.form} shards: data.reader={have} or auto, not {reader}"
        )
    return have


@dataclass(frozen=True)
class DataFacts:
    """What is known of a data set before it is read; a stream knows neither its length nor its classes."""

    fingerprint: str
    num_samples: int | None
    num_classes: int | None


def data_facts(data: str | Path, reader: str, access: Access) -> DataFacts:
    """Open the index, or list the stream's shards; nothing else is read or written. Raises DataError."""
    if choose_reader(data, reader) == "stream":
        return DataFacts(stream_fingerprint(stream_shards(data)), None, None)
    index = open_index(data, access)
    check_form(index, reader)
    return DataFacts(index.fingerprint, index.num_samples, index.num_classes)
