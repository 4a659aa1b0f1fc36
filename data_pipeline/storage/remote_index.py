"""The index of a remote data set: `shards.parquet` is read whole, parts of samples through the node's cache."""

from __future__ import annotations

import io
import logging
import zlib
from typing import Any

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.content import checksum_of_file
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.storage.access import Access
from tarflow.data_pipeline.storage.remote import MissingFileError, Remote
from tarflow.data_pipeline.storage.remote_shards import cache_name
from tarflow.data_pipeline.storage.roots import Roots
from tarflow.data_pipeline.storage.shard_cache import ShardCache

log = logging.getLogger("tarflow.data")


class _RemoteFiles:
    def __init__(self, url: str, access: Access) -> None:
        self.url = url
        self.access = access
        self.remote = Remote(access)
        self.missing = False  # whether a file was asked for that does not exist

    def open(self, name: str, digest: str, most: int, checksum: str = "") -> Any:
        """The list of shards is always fetched; parts are cached under the digest that the list gives them."""
        url = f"{self.url}/index/{name}"
        try:
            if not digest or not self.access.cache_bytes:
                return io.BytesIO(self._load(url, most, checksum))
            cache = ShardCache(self.access.folder(), self.access.cache_bytes)
            fd = cache.open(
                cache_name(url, digest), most if checksum else None, lambda file: file.write(self._load(url, most, checksum)),
                lambda fd: not checksum or checksum_of_file(fd) == checksum,
            )  # fmt: skip
            return open(fd, "rb")
        except MissingFileError as err:
            self.missing = True
            raise OSError(str(err)) from None

    def _load(self, url: str, most: int, checksum: str) -> bytes:
        """A file of the index; one with another checksum is fetched once more. Raises OSError if it differs again."""
        for again in (False, True):
            data = self.remote.load(url, most)
            if not checksum or f"{zlib.crc32(data):08x}" == checksum:
                return data
            if not again:
                log.warning("%s arrived damaged: it is fetched once more", url)
        raise OSError(f"{url} has another checksum than the list of shards says, twice")


def open_remote_index(url: str, access: Access) -> Index:
    """The index at `url`/index. Raises DataError if it is missing, unreachable or damaged, or names shards elsewhere."""
    access.check()
    url = url.rstrip("/")
    files = _RemoteFiles(url, access)
    try:
        index = Index(url, files)
    except DataError:
        if files.missing:
            raise DataError(
                f"there is no index at {url}/index: run `tarflow data index` where the shards are in the file system, "
                "and put the folder index/ beside them"
            ) from None
        raise
    Roots(url, access.allow_roots).check_shards(index)
    return index
