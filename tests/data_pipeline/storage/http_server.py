"""A loopback HTTP server that behaves as badly as it is told to."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Behaviour:
    """What is wrong with a server.

    `busy_every`, `cut_every`: every N-th request gets a 503, or half of its body (0 = never). `wrong`: the first N answers
    come with a flipped byte. `moved`: end of a name -> where an answer redirects to. `endless`: a body without an end.
    `drip`: seconds between single bytes.
    """

    ranges: bool = True
    delay: float = 0.0
    busy_every: int = 0
    cut_every: int = 0
    hang: bool = False
    status: int = 0  # of every answer for a shard, if not 0
    wrong: int = 0
    moved: dict[str, str] = field(default_factory=dict)
    endless: bool = False
    drip: float = 0.0
    only: str = ".tar"  # faults are for names that end so
    requests: list[tuple[str, str | None]] = field(default_factory=list)


class BadServer:
    """Serves a folder on 127.0.0.1; `url` is its address."""

    def __init__(self, folder: Path) -> None:
        self.behaviour = Behaviour()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):  # the client gave up
                    outer.answer(self, folder)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.lock = threading.Lock()
        self.faulty = self.sent = 0
        self.closed = False
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, folder: Path) -> None:
        what = self.behaviour
        asked = request.headers.get("Range")
        with self.lock:
            what.requests.append((request.path, asked))
            for_it = request.path.endswith(what.only)
            self.faulty += for_it
            number = self.faulty
            wrong = for_it and self.faulty <= what.wrong
        target = next((target for end, target in what.moved.items() if request.path.endswith(end)), None)
        if target is not None:
            request.send_response(302)
            request.send_header("Location", target)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if for_it and (what.endless or what.drip):
            self.go_on(request, what)
            return
        path = folder / request.path.lstrip("/")
        if what.hang and for_it:
            time.sleep(3)
        if what.delay and for_it:
            time.sleep(what.delay)
        if (
            not path.is_file()
            or (what.status and for_it)
            or (what.busy_every and for_it and number % what.busy_every == 0)
        ):
            code = 404 if not path.is_file() else what.status or 503
            request.send_response(code)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        body = path.read_bytes()
        if wrong:
            body = body[:700] + bytes([body[700] ^ 1]) + body[701:]
        total = len(body)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "") if what.ranges else None
        if match:
            start, end = int(match[1]), min(int(match[2]), total - 1)
            body = body[start : end + 1]
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{end}/{total}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if what.cut_every and for_it and number % what.cut_every == 0:
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
        else:
            request.wfile.write(body)

    def go_on(self, request: BaseHTTPRequestHandler, what: Behaviour) -> None:
        """A body that never comes to its end."""
        request.send_response(200)
        request.end_headers()
        request.close_connection = True
        while not self.closed:
            request.wfile.write(b"x" if what.drip else bytes(1 << 16))
            self.sent += 1 if what.drip else 1 << 16
            request.wfile.flush()
            time.sleep(what.drip)

    def close(self) -> None:
        self.closed = True
        self.server.shutdown()
        self.server.server_close()
