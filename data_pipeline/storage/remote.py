"""Bytes from HTTP servers and object stores, through fsspec: ranges, timeouts, bounded retries, errors that name the setting.

An attempt that fails for a reason that may pass (no answer in time, a cut body, HTTP 408, 425, 429 and 5xx, anything an
object store's client raises) is made again after a pause, at most `retries` times for one request. What cannot pass
(no such file, no permission, another size than expected) ends at once. HTTP is spoken through fsspec's session, but the
answers are read here: fsspec itself takes a whole file for the range that was asked, and a busy server for a missing file.

No answer is trusted with this machine: its size and its time are bounded, and it may lead on to other hosts only where
data.allow_roots says so (`roots`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.storage.roots import check_name, redirected

log = logging.getLogger("tarflow.data")

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/+[^/]")
_CHUNK = 8 << 20  # bytes asked for at once; a failure costs no more than that
_LEAST_RATE = 1 << 16  # bytes per second below which an answer counts as hanging, beside a floor of ten timeouts
_PASSING = frozenset({408, 425, 429})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5


@dataclass(frozen=True)
class Access:
    """How remote data are reached: settings data.cache_dir, data.cache_bytes, data.timeout_s, data.retries, data.allow_roots.

    `cache_dir`: folder of the shard cache that the processes of a node share (None: a folder of this user's in the
    system's temporary folder). `cache_bytes`: bound of that cache; 0 = no cache, every sample is a range request.
    `timeout_s`: seconds without a byte after which an attempt is given up. `retries`: attempts after the first.
    `allow_roots`: addresses under which data may lie, and redirects may lead, beside the index's own.
    """

    cache_dir: str | None = None
    cache_bytes: int = 32 << 30
    timeout_s: float = 30.0
    retries: int = 5
    allow_roots: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise DataError for a value out of range."""
        for name, value, right in (
            ("cache_bytes", self.cache_bytes, self.cache_bytes >= 0),
            ("timeout_s", self.timeout_s, self.timeout_s > 0),
            ("retries", self.retries, self.retries >= 0),
        ):
            if not right:
                raise DataError(f"data.{name} cannot be {value!r}")
        for root in self.allow_roots:
            if address(root) != root:
                raise DataError(f"data.allow_roots cannot hold {root!r}: expected PROTOCOL://HOST or a longer address")

    def folder(self) -> Path:
        """Where the cache is."""
        return Path(self.cache_dir or Path(tempfile.gettempdir()) / f"tarflow-cache-{os.geteuid()}")


def address(data: str | Path) -> str | None:
    """`data` as an address (`http://...`, `s3://...`), or None for a path. A Path that swallowed a slash is put right."""
    text = str(data)
    if not _ADDRESS.match(text):
        return None
    scheme, rest = text.split(":", 1)
    return f"{scheme}://{rest.lstrip('/')}" if scheme != "file" else f"file:///{rest.lstrip('/')}"


class NoRangesError(Exception):
    """The server sends whole files whatever range is asked for."""


class _StatusError(OSError):
    """An HTTP status that may be another one next time."""


class Remote:
    """Reads from addresses. Not to be shared between threads."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.stopped: Callable[[], bool] = lambda: False  # asked between attempts and pieces: True gives up at once
        self._systems: dict[str, Any] = {}

    def read(self, url: str, offset: int, size: int, total: int) -> bytes:
        """Exactly these bytes of a file of `total` bytes. Raises NoRangesError, BadSampleError or DataError."""
        got = bytearray()

        def attempt() -> bytes:
            del got[:]
            self._get(url, offset, size, total, got.extend)
            if len(got) != size:
                raise OSError(f"{len(got)} bytes came where {size} were asked for")
            return bytes(got)

        return self._persist(url, attempt)

    def load(self, url: str, most: int) -> bytes:
        """Read a whole small file of at most `most` bytes.

        Raises BadSampleError (`missing_shard`) where there is none, else DataError.
        """
        got = bytearray()

        def attempt() -> bytes:
            del got[:]
            self._get(url, None, None, None, got.extend, most)
            return bytes(got)

        return self._persist(url, attempt)

    def save(self, url: str, total: int, file: Any) -> None:
        """A whole file into the open, seekable `file` from its begin on: in ranges, or in one piece from a server without.

        The position is behind the last byte then; what `file` had beyond it is still there.
        """
        ranges = True
        while file.tell() < total:

            def attempt(end: int = min(file.tell() + _CHUNK, total)) -> None:
                nonlocal ranges
                if ranges:
                    try:  # what an attempt got before it failed is kept
                        self._get(url, file.tell(), end - file.tell(), total, file.write)
                        if file.tell() < end:
                            raise OSError(f"the answer ended {end - file.tell()} bytes early")
                        return
                    except NoRangesError:
                        ranges = False
                file.seek(0)
                self._get(url, None, None, total, file.write)
                if file.tell() != total:
                    raise OSError(f"{file.tell()} bytes came where the index says {total}")

            self._persist(url, attempt)
        if file.tell() != total:
            raise DataError(f"{url} sent {file.tell()} bytes, the index says {total}: it was changed after indexing")

    def _persist(self, url: str, attempt: Callable[[], Any]) -> Any:
        began = time.monotonic()
        for number in range(self.access.retries + 1):
            self._go_on()
            try:
                return attempt()
            except (DataError, NoRangesError):
                raise
            except FileNotFoundError:
                raise BadSampleError("missing_shard", f"there is nothing at {url}") from None
            except PermissionError as err:
                raise DataError(f"{url} may not be read ({err}): check the credentials") from None
            except Exception as err:  # every client library has errors of its own
                if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # the disk of the cache, no fault of the server
                last = err
            if number < self.access.retries:
                log.warning("attempt %d of %d at %s failed: %s", number + 1, self.access.retries + 1, url, _say(last))
                time.sleep(min(0.1 * 2**number, 10.0))
        raise DataError(
            f"cannot read {url}: {self.access.retries + 1} attempts in {time.monotonic() - began:.1f} s, the last: "
            f"{_say(last)} (settings data.retries={self.access.retries}, data.timeout_s={self.access.timeout_s:g})"
        )

    def _go_on(self) -> None:
        if self.stopped():
            raise DataError("given up: what it was for is over")

    def _get(
        self,
        url: str,
        offset: int | None,
        size: int | None,
        total: int | None,
        sink: Callable[[bytes], object],
        most: int | None = None,
    ) -> None:
        """One attempt; pieces go to `sink` as they come. `offset` None: the whole file, of `total` or at most `most` bytes."""
        import fsspec
        from fsspec.asyn import sync

        check_name(url)
        expected = size if size is not None else total if total is not None else most or 0
        scheme = url.split(":", 1)[0]
        if scheme not in self._systems:
            try:
                self._systems[scheme] = fsspec.core.url_to_fs(url)[0]
            except (ImportError, ValueError) as err:
                raise DataError(f"cannot reach {url}: {err}") from None
        system = self._systems[scheme]
        if scheme in ("http", "https"):
            sync(system.loop, self._http, system, url, offset, expected, total, sink)
            return
        path, start = system._strip_protocol(url), offset or 0
        end = start + expected + (offset is None)  # one more byte tells that there is too much
        if getattr(system, "async_impl", False):
            data = sync(system.loop, system._cat_file, path, start=start, end=end, timeout=self._patience(expected))
        else:
            data = system.cat_file(path, start=start, end=end)
        if len(data) > expected:
            raise _too_much(url, expected)
        sink(data)

    def _patience(self, size: int) -> float:
        """Seconds after which an answer of so many bytes counts as hanging, although some bytes come now and then."""
        return 10 * self.access.timeout_s + size / _LEAST_RATE

    async def _http(
        self,
        system: Any,
        url: str,
        offset: int | None,
        expected: int,
        total: int | None,
        sink: Callable[[bytes], object],
    ) -> None:
        import aiohttp

        headers = {"Accept-Encoding": "identity"}
        if offset is not None:
            headers["Range"] = f"bytes={offset}-{offset + expected - 1}"
        session = await system.set_session()
        patience = self.access.timeout_s
        timeout = aiohttp.ClientTimeout(total=self._patience(expected), sock_connect=patience, sock_read=patience)
        target = system.encode_url(url)
        for _ in range(_MOST_REDIRECTS + 1):
            began = time.monotonic()
            asked = session.get(target, headers=headers, timeout=timeout, allow_redirects=False)
            async with await asyncio.wait_for(asked, self._patience(0)) as answer:
                if answer.status in _REDIRECTS:
                    here, location = str(answer.url), answer.headers.get("Location")
                    target = system.encode_url(redirected(url, here, location, self.access.allow_roots))
                    continue
                self._check_status(answer.status, url, total)
                if offset is not None:
                    if answer.status != 206:
                        raise NoRangesError
                    self._check_range(answer.headers.get("Content-Range", ""), url, offset, total)
                got = 0
                async for piece in answer.content.iter_any():
                    self._go_on()
                    got += len(piece)
                    if got > expected:
                        raise _too_much(url, expected)
                    if time.monotonic() - began > self._patience(got):
                        raise TimeoutError(f"{got} bytes in {time.monotonic() - began:.1f} s")
                    sink(piece)
                return
        raise DataError(f"{url} redirects more than {_MOST_REDIRECTS} times")

    def _check_status(self, status: int, url: str, total: int | None) -> None:
        if status in (200, 206):
            return
        if status in (404, 410):
            raise FileNotFoundError(url)
        if status in (401, 403):
            raise PermissionError(f"HTTP {status}")
        if status == 416:
            raise DataError(f"{url} is shorter than the index says ({total} bytes): it was changed after indexing")
        if status >= 500 or status in _PASSING:
            raise _StatusError(f"HTTP {status}")
        raise DataError(f"{url} answers with HTTP {status}")

    def _check_range(self, header: str, url: str, offset: int, total: int | None) -> None:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header)
        if match is None or int(match[1]) != offset:
            raise OSError(f"asked for bytes from {offset}, the answer is for {header!r}")
        if total is not None and match[2] not in ("*", str(total)):
            raise DataError(f"{url} has {match[2]} bytes, the index says {total}: it was changed after indexing")


def _too_much(url: str, most: int) -> DataError:
    return DataError(f"{url} sends more than {most} bytes, which is all that there should be: it was given up")


def _say(err: BaseException) -> str:
    return (
        f"{type(err).__name__}: {err}"
        if not isinstance(err, _StatusError) and str(err)
        else str(err) or type(err).__name__
    )
