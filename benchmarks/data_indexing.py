"""How fast `tarflow data index` is beside a bare scan of the same headers, and that one command is all a foreign set needs.

The bare scan is the quickest loop that learns where members lie: read 512 bytes, take name and size, go on. It checks
nothing, groups nothing and writes nothing. Indexing does all of that, reads every byte for the fingerprint, and ends with the
files on disk. The bar is on the command as it runs, with one process per core; the figure for one process stands beside it.

Besides, in CPU seconds: the scan of the headers by itself, the standard library's `tarfile` on the same files, and the
checksums of their contents.
"""

import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.common import Bar, finish, parse_args
from benchmarks.data_images import scratch
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.index.content import ShardContent, content_of
from tarflow.data_pipeline.index.tar.scan import scan_tar
from tarflow.data_pipeline.loading.loader import Loader
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tarflow.data_pipeline.prepare.encode import encode

PER_SHARD = 10_000
IMAGE_BYTES = 1500  # of no importance to the scan


def write_shard(path: Path) -> None:
    """10,000 samples of an image and a label as webdataset writes them: with an extended header for a fractional time."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(PER_SHARD):
            for ending, content in (("cls", b"%d" % (number % 1000)), ("jpg", rng.bytes(IMAGE_BYTES))):
                info = tarfile.TarInfo(f"{number:08d}.{ending}")
                info.size, info.mtime = len(content), 1_700_000_000.25
                tar.addfile(info, BytesIO(content))


def bare_scan(path: Path) -> list[tuple[bytes, int, int]]:
    """(name, offset, size) of the members of a tar that is known to be in order."""
    found = []
    fd = os.open(path, os.O_RDONLY)
    position = 0
    while True:
        header = os.pread(fd, 512, position)
        if len(header) < 512 or header[0] == 0:
            break
        size = int(header[124:135], 8)
        found.append((header[:100].rstrip(b"\0"), position + 512, size))
        position += 512 + (size + 511) // 512 * 512
    os.close(fd)
    return found


def by_tarfile(path: Path) -> list[tuple[bytes, int, int]]:
    """The same by the standard library, which checks and understands every header as our scan does."""
    with tarfile.open(path) as tar:
        return [(member.name.encode(), member.offset_data, member.size) for member in tar if member.isfile()]


def checksum(path: Path) -> ShardContent:
    """What the fingerprint needs beside the headers: every byte of the shard, and its sketch."""
    return content_of(path)


def by_scan(path: Path) -> list[tuple[bytes, int, int]]:
    """The same by the scan that indexing uses."""
    scan = scan_tar(path)
    return list(zip(scan.names, scan.offsets, scan.sizes))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def foreign_set(where: Path, samples: int) -> tuple[float, float]:
    """Write a set with plain webdataset, index it with the command, read an epoch: (seconds to index, images/s)."""
    import webdataset as wds

    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    where.mkdir()
    with wds.ShardWriter(str(where / "part-%04d.tar"), maxcount=1500, verbose=0) as writer:
        for number in range(samples):
            picture[...] = (number & 255, number >> 8, 0)
            writer.write(
                {"__key__": f"{number:06d}", "png": encode(picture, "png"), "cls": number % 10, "json": {"n": number}}
            )
    command = [sys.executable, "-m", "tarflow", "data", "index", str(where)]
    took = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    seen = []
    with Loader(DataSettings.of(where, num_workers=1), ImageShape(32, num_classes=10), BatchShard(100)) as loader:
        began = time.perf_counter()
        for batch in islice(loader, samples // 100):
            pixels = batch.images[:, :2, 5, 5].long()
            numbers = pixels[:, 0] + 256 * pixels[:, 1]
            assert (numbers == batch.ids).all()
            assert (batch.labels == numbers % 10).all()
            seen += numbers.tolist()
    assert sorted(seen) == list(range(samples)), "an epoch is not every sample once"
    return took, samples / (time.perf_counter() - began)


def main() -> int:
    args = parse_args(__doc__.splitlines()[0])
    count, rounds = (36, 2) if args.quick else (64, 5)
    with scratch() as where:
        shards = [where / f"shard-{i:04d}.tar" for i in range(count)]
        write_shard(shards[0])
        for shard in shards[1:]:
            os.link(shards[0], shard)
        gigabytes = shards[0].stat().st_size * len(shards[: count // 9]) / 1e9
        members = 4 * PER_SHARD * count  # headers: a time stamp, a label, a time stamp, an image
        some = shards[: count // 9]  # for tarfile, which takes ten times as long
        assert by_scan(shards[0]) == by_tarfile(shards[0])
        bare: list[float] = []
        scans: dict[Callable[[Path], object], str] = {
            bare_scan: "bare", by_scan: "ours", by_tarfile: "tarfile", checksum: "checksums",
        }  # fmt: skip
        cpu: dict[str, list[float]] = {name: [] for name in scans.values()}
        single: list[float] = []
        several: list[float] = []
        for _ in range(rounds):
            bare.append(seconds(lambda: [bare_scan(shard) for shard in shards]))
            for scan, name in scans.items():
                began = time.process_time()
                for shard in some:
                    scan(shard)
                cpu[name].append(time.process_time() - began)
            single.append(seconds(lambda: build_index(where, shards, processes=1)))
            several.append(seconds(lambda: build_index(where, shards)))
        took, rate = foreign_set(where / "foreign", 2000 if args.quick else 10_000)
    rows = [
        (name, f"{median(times):.2f}", f"{members / median(times):,.0f}",
         f"{median(b / t for b, t in zip(bare, times)):.2f}")
        for name, times in (("bare header scan", bare), ("index, one process", single), ("index, as the command", several))
    ]  # fmt: skip
    print(
        f"{count} shards, {members:,} members; a set by plain webdataset: indexed in {took:.1f} s, read at {rate:,.0f} images/s"
    )
    million = 4e-6 * PER_SHARD * len(some)
    print(f"checksums: {median(cpu.pop('checksums')) / gigabytes:.2f} CPU seconds per GB")
    print(
        "CPU seconds per million headers: " + ", ".join(f"{name} {median(s) / million:.2f}" for name, s in cpu.items())
    )
    print(f"tarfile / ours, CPU: {median(t / o for t, o in zip(cpu['tarfile'], cpu['ours'])):.1f}")
    speed = median(b / t for b, t in zip(bare, several))
    bars = [
        Bar("indexing / bare header scan", speed, at_least=0.8, reason="the disk and the headers should be the limit")
    ]
    return finish(
        args, rows, ("what", "seconds", "headers/s", "of the bare scan"), bars, ("numpy", "pyarrow", "webdataset")
    )


if __name__ == "__main__":
    sys.exit(main())
