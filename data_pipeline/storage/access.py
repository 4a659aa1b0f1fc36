"""How remote data are reached: the settings for it, and what counts as an address."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tarflow.data_pipeline.errors import DataError

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/+[^/]")
_LEAST_RATE = 1 << 16  # bytes per second below which an answer counts as hanging, on top of ten timeouts


@dataclass(frozen=True)
class Access:
    """How remote data are reached: settings data.cache_dir, data.cache_bytes, data.timeout_s, data.retries, data.allow_roots.

    `cache_dir`: folder of the shard cache that the processes of a node share (None: a folder of this user's in the
    system's temporary folder). `cache_bytes`: limit of that cache; 0 = no cache, every sample is a range request.
    `timeout_s`: seconds without a byte before an attempt is aborted. `retries`: attempts after the first.
    `allow_roots`: addresses under which data may lie, and to which redirects may lead, beside the index's own.
    """

    cache_dir: str | None = None
    cache_bytes: int = 32 << 30
    timeout_s: float = 30.0
    retries: int = 5
    allow_roots: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise DataError for a value out of range."""
        for name, value, valid in (
            ("cache_bytes", self.cache_bytes, self.cache_bytes >= 0),
            ("timeout_s", self.timeout_s, self.timeout_s > 0),
            ("retries", self.retries, self.retries >= 0),
        ):
            if not valid:
                raise DataError(f"data.{name} cannot be {value!r}")
        for root in self.allow_roots:
            if address(root) != root:
                raise DataError(f"data.allow_roots cannot hold {root!r}: expected PROTOCOL://HOST or a longer address")

    def folder(self) -> Path:
        """The folder of the cache."""
        return Path(self.cache_dir or Path(tempfile.gettempdir()) / f"tarflow-cache-{os.geteuid()}")

    def time_limit(self, size: int) -> float:
        """Seconds after which an answer of `size` bytes counts as hanging, even if bytes still arrive now and then."""
        return 10 * self.timeout_s + size / _LEAST_RATE


def address(data: str | Path) -> str | None:
    """`data` as an address (`http://...`, `s3://...`), or None for a path. Restores the slash that a Path swallows."""
    text = str(data)
    if not _ADDRESS.match(text):
        return None
    scheme, rest = text.split(":", 1)
    return f"{scheme}://{rest.lstrip('/')}" if scheme != "file" else f"file:///{rest.lstrip('/')}"
