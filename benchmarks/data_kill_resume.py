"""Kill -9 and go on, a hundred times: no id lost or repeated, no process, shared memory or half file left.

A consumer reads a small set over HTTP (a slow server that knows no ranges) through a cache that holds only part of it,
with two worker processes, and writes down each batch as a trainer commits a step. It is killed after a random number of
batches and a random pause: while it starts, fetches, decodes or writes. The next one goes on from the last line that
was written. In the end the lines must be exactly the stream of an uninterrupted run.
"""

import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Bar, finish, parse_args
from benchmarks.data_images import scratch
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.loading.loader import Loader
from tarflow.data_pipeline.loading.order import Order
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tarflow.data_pipeline.prepare.encode import encode
from tarflow.data_pipeline.storage.open_index import open_index

logging.getLogger("tarflow.data").setLevel(logging.ERROR)  # each of a hundred runs would name the empty shard
BATCH = 8
SIZES = (90, 1, 47, 0, 60)
SEED, SHUFFLE_BLOCK = 5, 32


class SlowHandler(SimpleHTTPRequestHandler):
    """Whole files only, in small pieces with pauses: kills fall into the middle of them."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with contextlib.suppress(ConnectionError):  # the other side was killed
            while piece := source.read(1 << 13):
                outputfile.write(piece)
                time.sleep(0.004)

    def log_message(self, *_: object) -> None:
        pass


def serve(folder: str) -> None:
    """Serve until this process is ended; the port goes to stdout first."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SlowHandler, directory=folder))
    print(server.server_port, flush=True)
    server.serve_forever()


def write_set(root: Path) -> None:
    root.mkdir()
    number, shards = 0, []
    noise = np.random.default_rng(0)
    for shard, size in enumerate(SIZES):
        shards.append(root / f"s{shard}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for _ in range(size):
                pixels = noise.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                pixels[0, 0] = (number & 255, number >> 8, 0)
                content = encode(pixels, "png")
                info = tarfile.TarInfo(f"{number:06d}.png")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
                number += 1
    build_index(root, shards)


def make_loader(url: str, images_seen: int, cache: Path, limit: int, workers: int) -> Loader:
    """Goes on from a position, through a cache of at most `limit` bytes."""
    data = DataSettings.of(
        url, num_workers=workers, cache_dir=str(cache), cache_bytes=limit, shuffle_block=SHUFFLE_BLOCK
    )
    return Loader(data, ImageShape(24), BatchShard(BATCH, images_seen, seed=SEED))


def consume(url: str, log: Path, cache: Path, limit: int) -> None:
    """Go on from the last line of `log`; a line holds the position after its batch and the numbers in its pictures."""
    seen = position(log)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with make_loader(url, seen, cache, limit, workers=2) as loader:
        for batch in loader:
            corner = batch.images[:, :, 0, 0].long()
            numbers = (corner[:, 0] + 256 * corner[:, 1]).tolist()
            os.write(fd, (json.dumps([batch.images_seen + BATCH, numbers]) + "\n").encode())


def position(log: Path) -> int:
    lines = log.read_bytes().splitlines() if log.exists() else []
    return int(json.loads(lines[-1])[0]) if lines else 0


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


@dataclass
class Tally:
    """What the kills have shown so far."""

    survivors: int = 0
    half_files: int = 0
    stuck: int = 0


def kill_once(tally: Tally, wanted: int, linger_s: float, url: str, log: Path, cache: Path, limit: int) -> None:
    """Start a consumer, kill it some time after it has read `wanted` images, and see what is left of it."""
    # A fork of this process, which has loaded torch and has no threads: a start costs milliseconds.
    pid = os.fork()
    if pid == 0:
        try:
            consume(url, log, cache, limit)
        finally:
            os._exit(1)
    patience = time.monotonic() + 60
    while position(log) < wanted and time.monotonic() < patience and alive(pid):
        time.sleep(0.002)
    tally.stuck += position(log) < wanted
    time.sleep(linger_s)
    workers = children(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    tally.half_files += sum(path.suffix == ".partial" for path in cache.iterdir()) if cache.exists() else 0
    patience = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < patience:
        time.sleep(0.01)
    tally.survivors += sum(map(alive, workers))


def read_on(url: str, log: Path, cache: Path, limit: int, images: int) -> int:
    """Read `images` more in a run that ends in an orderly way; its exit status."""
    pid = os.fork()
    if pid == 0:
        wanted = position(log) + images
        with make_loader(url, position(log), cache, limit, workers=1) as loader:
            next(batch for batch in loader if batch.images_seen >= wanted)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def out_of_order(log: Path, shard_sizes: NDArray[np.int64]) -> tuple[int, int]:
    """(Images that were read, those of them that are not what the order says at their place)."""
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    ids = [number for _, numbers in lines for number in numbers]
    order = Order(shard_sizes, seed=SEED, shuffle_block=SHUFFLE_BLOCK)
    wrong = sum(a != b for a, b in zip(ids, order.batch(0, len(ids)).tolist()))
    gaps = [seen for seen, _ in lines] != list(range(BATCH, len(ids) + 1, BATCH))
    return len(ids), wrong + gaps


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
        return 0
    args = parse_args(__doc__.splitlines()[0])
    kills = 10 if args.quick else 100
    dice = random.Random(1)
    shared = set(os.listdir("/dev/shm"))
    tally = Tally()
    with scratch() as where:
        write_set(where / "set")
        index = open_index(where / "set")
        cache, log = where / "cache", where / "log"
        limit = int(index.shard_bytes.max()) + 30_000  # the two largest never fit together: fetching does not end
        server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.data_kill_resume", "--serve", str(where / "set")], stdout=subprocess.PIPE
        )
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            began = time.monotonic()
            for number in range(kills):
                wanted = position(log) + BATCH * dice.choice([0, 0, 1, 2, 5, 9, 20])
                kill_once(tally, wanted, dice.uniform(0, 0.6), url, log, cache, limit)
                if number % 10 == 9:
                    print(f"{number + 1} kills, {position(log)} images", file=sys.stderr)
            seconds = time.monotonic() - began
            status = read_on(url, log, cache, limit, 2 * index.num_samples)
        finally:
            server.kill()
            server.wait()
        images, wrong = out_of_order(log, index.shard_sizes)
        left = [path.name for path in cache.iterdir() if path.suffix != ".shard"]
        in_cache = sum(path.stat().st_size for path in cache.iterdir())
    new_shared = set(os.listdir("/dev/shm")) - shared
    rows = [
        ("kills", str(kills)), ("seconds", f"{seconds:.0f}"), ("images", str(images)),
        ("epochs", f"{images / index.num_samples:.1f}"), ("half-written files met after a kill", str(tally.half_files)),
        ("bytes in the cache / bound", f"{in_cache} / {limit}"),
    ]  # fmt: skip
    bars = [
        Bar("ids out of order, lost or repeated", wrong, at_most=0, reason="the stream is one"),
        Bar("runs that made no progress", tally.stuck + (status != 0), at_most=0),
        Bar("workers alive 10 s after their parent", tally.survivors, at_most=0),
        Bar("new entries in /dev/shm", len(new_shared), at_most=0),
        Bar("half-written or lock files in the cache at the end", len(left), at_most=0),
        Bar("cache / bound", in_cache / limit, at_most=1),
    ]
    return finish(args, rows, ("what", "figure"), bars)


if __name__ == "__main__":
    sys.exit(main())
