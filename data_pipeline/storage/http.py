"""One HTTP request for a file or a range of it.

It is sent through fsspec's session, but the answer is read here: fsspec itself takes a whole file for the range that was
asked for, and a busy server for a missing file. No answer is trusted with this machine: its size and its time are bounded,
and it may redirect to other hosts only where data.allow_roots says so (`roots`).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.storage.access import Access
from tarflow.data_pipeline.storage.roots import redirected

_TRANSIENT = frozenset({408, 425, 429})  # besides all of 5xx
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5


@dataclass(frozen=True)
class Request:
    """What is asked for: `expected` bytes from `offset` on, or with offset None the whole file, of at most `expected`.

    `total`: the size of the file as the index says, None where that is not known.
    """

    url: str
    offset: int | None
    expected: int
    total: int | None


class NoRangesError(Exception):
    """The server sends whole files whatever range is asked for."""


class TransientStatusError(OSError):
    """An HTTP status that may be another one next time."""


async def http_get(
    system: Any, request: Request, access: Access, check_stopped: Callable[[], None], sink: Callable[[bytes], object]
) -> None:
    """Send a request through the session of `system` (fsspec's); pieces of the answer go to `sink` as they arrive.

    `check_stopped`: raises where the answer is no longer wanted. Raises NoRangesError, DataError for what another attempt
    would meet again, FileNotFoundError, PermissionError, and other OSErrors for what may pass.
    """
    import aiohttp

    url = request.url
    headers = {"Accept-Encoding": "identity"}
    if request.offset is not None:
        headers["Range"] = f"bytes={request.offset}-{request.offset + request.expected - 1}"
    session = await system.set_session()
    timeout = aiohttp.ClientTimeout(
        total=access.time_limit(request.expected), sock_connect=access.timeout_s, sock_read=access.timeout_s
    )
    target = system.encode_url(url)
    for _ in range(_MOST_REDIRECTS + 1):
        began = time.monotonic()
        asked = session.get(target, headers=headers, timeout=timeout, allow_redirects=False)
        async with await asyncio.wait_for(asked, access.time_limit(0)) as answer:
            # Redirects are followed here and not by the client, which would follow them to any host.
            if answer.status in _REDIRECTS:
                target = system.encode_url(
                    redirected(url, str(answer.url), answer.headers.get("Location"), access.allow_roots)
                )
                continue
            _check_status(answer.status, request)
            if request.offset is not None:
                if answer.status != 206:
                    raise NoRangesError
                _check_range(answer.headers.get("Content-Range", ""), request)

            # What was promised is not what comes: every piece counts against the limits of size and time.
            received = 0
            async for piece in answer.content.iter_any():
                check_stopped()
                received += len(piece)
                if received > request.expected:
                    raise too_much(request)
                elapsed = time.monotonic() - began
                if elapsed > access.time_limit(received):
                    raise TimeoutError(f"{received} bytes in {elapsed:.1f} s")
                sink(piece)
            return
    raise DataError(f"{url} redirects more than {_MOST_REDIRECTS} times")


def too_much(request: Request) -> DataError:
    """The error for an answer that is longer than it can be."""
    return DataError(
        f"{request.url} sends more than {request.expected} bytes, the most there can be: the request was aborted"
    )


def _check_status(status: int, request: Request) -> None:
    if status in (200, 206):
        return
    if status in (404, 410):
        raise FileNotFoundError(request.url)
    if status in (401, 403):
        raise PermissionError(f"HTTP {status}")
    if status == 416:
        raise DataError(
            f"{request.url} is shorter than the index says ({request.total} bytes): it was changed after indexing"
        )
    if status >= 500 or status in _TRANSIENT:
        raise TransientStatusError(f"HTTP {status}")
    raise DataError(f"{request.url} answers with HTTP {status}")


def _check_range(header: str, request: Request) -> None:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header)
    if match is None or int(match[1]) != request.offset:
        raise OSError(f"asked for bytes from {request.offset}, the answer is for {header!r}")
    if request.total is not None and match[2] not in ("*", str(request.total)):
        raise DataError(
            f"{request.url} has {match[2]} bytes, the index says {request.total}: it was changed after indexing"
        )
