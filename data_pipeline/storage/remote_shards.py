"""Bytes of remote shards: from the node's cache, or range by range without one."""

from __future__ import annotations

import hashlib
import logging
import os
from typing import Any

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.content import checksum_of_file, sketch_of_file
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.storage.access import Access
from tarflow.data_pipeline.storage.http import NoRangesError
from tarflow.data_pipeline.storage.local_shards import LocalShards, OpenFiles, ShardFiles, read_at
from tarflow.data_pipeline.storage.remote import Remote
from tarflow.data_pipeline.storage.shard_cache import ShardCache

log = logging.getLogger("tarflow.data")

_OPEN_FILES = 16  # few: a file that the cache evicted keeps its disk space while it is open


class RemoteShards:
    """See `ShardFiles`. A shard is cached whole when it is first needed: its other samples will be needed soon.

    Without a cache (`cache_bytes` 0), and for a shard larger than all of it, each sample is a range request.
    """

    def __init__(self, index: Index, access: Access) -> None:
        self.index = index
        self.access = access
        self.remote = Remote(access)
        self.cache = ShardCache(access.folder(), access.cache_bytes) if access.cache_bytes else None
        self._files = OpenFiles(_OPEN_FILES, self._open)
        self._checked: set[int] = set()  # cached files are compared once per process

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """See `ShardFiles`."""
        total = int(self.index.shard_bytes[shard])
        if self.cache is None or total > self.access.cache_bytes:
            return self._range(shard, offset, size, total)
        return read_at(self._files.of(shard), offset, size)

    def fetch(self, shard: int) -> None:
        """Put a shard into the cache, where there is a cache that can hold it.

        A cached one is compared whole, and fetched again if it is not what was indexed.
        """
        if self.cache is not None and int(self.index.shard_bytes[shard]) <= self.access.cache_bytes:
            os.close(self._open(shard, whole=True))

    def _open(self, shard: int, whole: bool = False) -> int:
        assert self.cache is not None
        url, total = self.index.shard_place(shard), int(self.index.shard_bytes[shard])
        name = cache_name(url, self.index.shard_digest(shard))
        return self.cache.open(
            name, total, lambda file: self._fetch(shard, url, total, file), lambda fd: self._right(shard, fd, whole)
        )

    def _right(self, shard: int, fd: int, whole: bool) -> bool:
        """Whether a cached file is the shard that was indexed.

        `whole`: compare all of it and not only its sketch, which has to do while a reader waits.
        """
        content = self.index.shard_content(shard)
        if content is None or shard in self._checked:
            return True
        try:
            if whole:
                right = checksum_of_file(fd) == content.checksum
            else:
                right = sketch_of_file(fd, content.file_bytes) == content.sketch
        except OSError:
            right = False
        if right:
            self._checked.add(shard)
        else:
            log.warning("the copy of %s in the cache is damaged and is fetched again", self.index.shard_place(shard))
        return right

    def _fetch(self, shard: int, url: str, total: int, file: Any) -> None:
        """Write a shard into the cache and check it against the index; a wrong one is fetched once more."""
        content = self.index.shard_content(shard)
        found = ""
        for again in (False, True):
            file.seek(0)
            self.remote.save(url, total, file)
            file.flush()
            if content is None:
                return
            found = checksum_of_file(file.fileno())
            if found == content.checksum:
                self._checked.add(shard)
                return
            if not again:
                log.warning("shard %s arrived with other bytes than were indexed: it is fetched once more", url)
        assert content is not None
        raise DataError(
            f"shard {url} holds other bytes than when it was indexed (checksum {found}, twice; the index says "
            f"{content.checksum}): put shards and index/ there that belong together"
        )

    def close(self) -> None:
        """Close the cached files."""
        self._files.close()

    def _range(self, shard: int, offset: int, size: int, total: int) -> bytes:
        url = self.index.shard_place(shard)
        try:
            return self.remote.read(url, offset, size, total)
        except NoRangesError:
            raise DataError(
                f"the server of {url} ignores ranges and sends whole files: shards must go through the cache, "
                f"set data.cache_bytes (now {self.access.cache_bytes}) to more than {total}"
            ) from None


class Shards:
    """See `ShardFiles`: the shards of an index in the file system and behind addresses."""

    def __init__(self, index: Index, access: Access) -> None:
        self.index = index
        self.access = access
        self._local = LocalShards(index)
        self._remote: RemoteShards | None = None

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """See `ShardFiles`."""
        if not self.index.is_remote(shard):
            return self._local.read(shard, offset, size)
        self._remote = self._remote or RemoteShards(self.index, self.access)
        return self._remote.read(shard, offset, size)

    def close(self) -> None:
        """Close whatever is open."""
        self._local.close()
        if self._remote is not None:
            self._remote.close()


def open_shards(index: Index, access: Access) -> ShardFiles:
    """The reader for the shards of this index."""
    return Shards(index, access) if index.any_remote else LocalShards(index)


def cache_name(url: str, digest: str) -> str:
    """The name in the cache, never shared with another data set or another version of this one."""
    return hashlib.sha256(f"{url}\0{digest}".encode()).hexdigest()[:40]


def unchecked(index: Index, access: Access) -> str | None:
    """One line on why fetched bytes are not checked against the index; None if they are, or nothing is fetched."""
    if not index.any_remote:
        return None
    if not index.knows_content:
        return f"what is fetched from {index.root} is not checked: its index, of an earlier version, holds no checksums"
    if not access.cache_bytes:
        return f"what is fetched from {index.root} is not checked: without a cache (data.cache_bytes=0) no shard is read whole"
    return None
