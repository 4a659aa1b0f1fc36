"""Bytes from HTTP servers and object stores, through fsspec: ranges, bounded retries, errors that name the setting.

An attempt that fails for a reason that may pass (no answer in time, a truncated body, HTTP 408, 425, 429 and 5xx, anything
an object store's client raises) is repeated after a pause, at most `retries` times per request. What cannot pass (no such
file, no permission, another size than expected) ends at once.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import Any

from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.storage.access import Access
from tarflow.data_pipeline.storage.http import NoRangesError, Request, TransientStatusError, http_get, too_much
from tarflow.data_pipeline.storage.roots import check_name

log = logging.getLogger("tarflow.data")

_CHUNK = 8 << 20  # bytes per request; a failure costs no more than that


class MissingFileError(BadSampleError):
    """There is no file at an address."""

    def __init__(self, url: str) -> None:
        super().__init__("missing_shard", f"there is nothing at {url}")


class Remote:
    """Reads from addresses. Not to be shared between threads."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.stopped: Callable[[], bool] = lambda: False  # polled between attempts and pieces: True aborts at once
        self._systems: dict[str, Any] = {}

    def read(self, url: str, offset: int, size: int, total: int) -> bytes:
        """Exactly these bytes of a file of `total` bytes. Raises NoRangesError, MissingFileError or DataError."""
        got = bytearray()

        def attempt() -> bytes:
            got.clear()
            self._get(Request(url, offset, size, total), got.extend)
            if len(got) != size:
                raise OSError(f"{len(got)} bytes came where {size} were asked for")
            return bytes(got)

        return self._with_retries(url, attempt)

    def load(self, url: str, most: int) -> bytes:
        """Read a whole small file of at most `most` bytes. Raises MissingFileError or DataError."""
        got = bytearray()

        def attempt() -> bytes:
            got.clear()
            self._get(Request(url, None, most, None), got.extend)
            return bytes(got)

        return self._with_retries(url, attempt)

    def save(self, url: str, total: int, file: Any) -> None:
        """Write a whole file into the open, seekable `file` from its start: in ranges, or at once from a server without.

        Leaves the position behind the last byte; what `file` had beyond it is still there.
        """
        ranges = True
        while file.tell() < total:

            def attempt(end: int = min(file.tell() + _CHUNK, total)) -> None:
                nonlocal ranges
                if ranges:
                    try:  # what an attempt got before it failed is kept
                        self._get(Request(url, file.tell(), end - file.tell(), total), file.write)
                        if file.tell() < end:
                            raise OSError(f"the answer ended {end - file.tell()} bytes early")
                        return
                    except NoRangesError:
                        ranges = False
                file.seek(0)
                self._get(Request(url, None, total, total), file.write)
                if file.tell() != total:
                    raise OSError(f"{file.tell()} bytes came where the index says {total}")

            self._with_retries(url, attempt)
        if file.tell() != total:
            raise DataError(f"{url} sent {file.tell()} bytes, the index says {total}: it was changed after indexing")

    def _with_retries(self, url: str, attempt: Callable[[], Any]) -> Any:
        """The result of `attempt`, which is repeated while it fails for a reason that may pass."""
        began = time.monotonic()
        attempts = self.access.retries + 1
        for number in range(1, attempts + 1):
            self._check_stopped()
            try:
                return attempt()
            except (DataError, NoRangesError):
                raise
            except FileNotFoundError:
                raise MissingFileError(url) from None
            except PermissionError as err:
                raise DataError(f"{url} may not be read ({err}): check the credentials") from None
            except Exception as err:  # every client library has errors of its own
                if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # the disk of the cache is full, which is not the server's fault
                last = err
            if number < attempts:
                log.warning("attempt %d of %d at %s failed: %s", number, attempts, url, _in_words(last))
                time.sleep(min(0.1 * 2 ** (number - 1), 10.0))
        raise DataError(
            f"cannot read {url}: {attempts} attempts in {time.monotonic() - began:.1f} s, the last: {_in_words(last)} "
            f"(settings data.retries={self.access.retries}, data.timeout_s={self.access.timeout_s:g})"
        )

    def _check_stopped(self) -> None:
        if self.stopped():
            raise DataError("aborted: the loader was closed")

    def _get(self, request: Request, sink: Callable[[bytes], object]) -> None:
        """One attempt; pieces go to `sink` as they arrive."""
        from fsspec.asyn import sync

        url, expected = request.url, request.expected
        check_name(url)
        system = self._system(url)
        if url.split(":", 1)[0] in ("http", "https"):
            sync(system.loop, http_get, system, request, self.access, self._check_stopped, sink)
            return

        # An object store's client hands over all bytes at once. One more than expected shows that there are too many.
        path, start = system._strip_protocol(url), request.offset or 0
        end = start + expected + (request.offset is None)
        if getattr(system, "async_impl", False):
            limit = self.access.time_limit(expected)
            data = sync(system.loop, system._cat_file, path, start=start, end=end, timeout=limit)
        else:
            data = system.cat_file(path, start=start, end=end)
        if len(data) > expected:
            raise too_much(request)
        sink(data)

    def _system(self, url: str) -> Any:
        """The fsspec file system of an address. Raises DataError where none is installed for its protocol."""
        import fsspec

        scheme = url.split(":", 1)[0]
        if scheme not in self._systems:
            try:
                self._systems[scheme] = fsspec.core.url_to_fs(url)[0]
            except (ImportError, ValueError) as err:
                raise DataError(f"cannot reach {url}: {err}") from None
        return self._systems[scheme]


def _in_words(err: BaseException) -> str:
    if isinstance(err, TransientStatusError) or not str(err):
        return str(err) or type(err).__name__
    return f"{type(err).__name__}: {err}"
