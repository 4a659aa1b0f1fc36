"""How fast batches of 256 px JPEGs come: ours beside the usual loaders, in one run, on the same files.

Every loader gives uint8 [64, 3, 256, 256] of the same pixels (checked before anything is timed), from a warm page
cache. All but ImageFolder use the same fast decoder. Ours shuffles, as in training; the others read in their cheapest
order. Rounds alternate, so that what else the machine does meets all of them; figures are medians over the rounds and
bars compare figures of the same round. Starting up is not timed: workers run before the clock does.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from benchmarks.common import Bar, finish, parse_args
from benchmarks.data_images import SIZE, files_of, scratch, write_images
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.loading.loader import Loader
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape

BATCH = 64
AHEAD = 4  # batches that each loader may prepare ahead
PACKAGES = ("torch", "numpy", "simplejpeg", "webdataset", "mosaicml-streaming", "torchvision")
Batches = Iterator[torch.Tensor]
Contender = Callable[[int], Any]  # workers -> context manager that gives an iterator of image batches


def picture(data: bytes) -> NDArray[np.uint8]:
    """The decoder of all contenders: uint8 [256, 256, 3]."""
    return np.asarray(simplejpeg.decode_jpeg(data, "RGB"))


def stacked(images: list[NDArray[np.uint8]]) -> torch.Tensor:
    """The batch form of all contenders: uint8 [n, 3, 256, 256], channels last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def torch_batches(data: Any, workers: int, **options: Any) -> Any:
    return torch.utils.data.DataLoader(data, num_workers=workers, prefetch_factor=AHEAD, **options)


def ours(data: Path) -> Contender:
    @contextmanager
    def start(workers: int) -> Iterator[Batches]:
        settings = DataSettings.of(data, num_workers=workers, prefetch_batches=AHEAD)
        with Loader(settings, ImageShape(SIZE), BatchShard(BATCH)) as loader:
            yield (batch.images for batch in loader)

    return start


def plain_webdataset(data: Path) -> Contender:
    import webdataset as wds

    shards = [str(path) for path in sorted(data.glob("*.tar"))]

    @contextmanager
    def start(workers: int) -> Iterator[Batches]:
        samples = wds.WebDataset(shards, shardshuffle=False).map(lambda sample: picture(sample["jpg"]))
        batched = samples.batched(BATCH, collation_fn=stacked, partial=False)
        yield iter(torch_batches(batched, workers, batch_size=None))

    return start


def streaming_dataset(folder: Path) -> Contender:
    from streaming import StreamingDataset

    class Images(StreamingDataset):  # type: ignore[misc, unused-ignore]
        def __getitem__(self, at: int) -> NDArray[np.uint8]:
            return picture(super().__getitem__(at)["image"])

    data = Images(local=str(folder), batch_size=BATCH, shuffle=False)

    @contextmanager
    def start(workers: int) -> Iterator[Batches]:
        yield iter(torch_batches(data, workers, batch_size=BATCH, collate_fn=stacked))

    return start


def image_folder(folder: Path) -> Contender:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    data = ImageFolder(str(folder), PILToTensor())

    @contextmanager
    def start(workers: int) -> Iterator[Batches]:
        yield (images for images, _ in torch_batches(data, workers, batch_size=BATCH))

    return start


def write_forms(files: list[bytes], where: Path) -> None:
    """The same files as MDS shards and as a folder."""
    from streaming import MDSWriter

    with MDSWriter(out=str(where / "mds"), columns={"image": "bytes", "label": "int"}, size_limit=1 << 23) as writer:
        for data in files:
            writer.write({"image": data, "label": 0})
    (where / "folder" / "all").mkdir(parents=True)
    for number, data in enumerate(files):
        (where / "folder" / "all" / f"{number:06d}.jpg").write_bytes(data)


def decode_only(files: list[bytes]) -> float:
    """Images per second of the decoder alone: one process, bytes in memory, into a batch that is there already."""
    batch = np.empty((BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    began = time.perf_counter()
    for number, data in enumerate(files):
        simplejpeg.decode_jpeg(data, "RGB", buffer=batch[number % BATCH])
    return len(files) / (time.perf_counter() - began)


def tree_cpu() -> float:
    """CPU seconds so far of this process and the living ones it started."""
    ticks, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
            for task in Path(f"/proc/{pid}/task").iterdir():
                with suppress(OSError):  # a thread may end while we look
                    waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(contender: Contender, workers: int, count: int, warm: int) -> tuple[float, float]:
    """(images per second, CPU microseconds per image) over `count` batches after `warm` untimed ones."""
    with contender(workers) as batches:
        for _ in range(warm):
            next(batches)
        began, cpu = time.perf_counter(), tree_cpu()
        for _ in range(count):
            images = next(batches)
            assert images.shape == (BATCH, 3, SIZE, SIZE)
            assert images.dtype == torch.uint8
        seconds, cpu = time.perf_counter() - began, tree_cpu() - cpu
    return count * BATCH / seconds, 1e6 * cpu / (count * BATCH)


def check_pixels(contenders: dict[str, Contender], files: list[bytes]) -> None:
    """Every image of an epoch comes from every contender with the same pixels. Warms the page cache on the way."""

    def sums(images: NDArray[np.uint8]) -> list[int]:
        weights = np.arange(1, SIZE + 1, dtype=np.uint64)
        return [int((image.sum((0, 2), dtype=np.uint64) * weights).sum()) for image in images]

    whole = len(files) // BATCH
    expected = {total for data in files for total in sums(picture(data)[None])}
    for name, contender in contenders.items():
        with contender(1) as batches:
            seen = [total for _ in range(whole) for total in sums(next(batches).permute(0, 2, 3, 1).numpy())]
        strange = set(seen) - expected
        assert not strange, f"{name}: {len(strange)} of {len(seen)} images differ"
        # An epoch, less the last incomplete batch; a few photographs have tiles that are equal.
        assert len(set(seen)) >= 0.97 * len(seen), f"{name}: images repeat"


def main() -> int:
    args = parse_args(__doc__.splitlines()[0], [("--rounds", {"type": int, "help": "rounds (7; quick: 3)"})])
    rounds = args.rounds or (3 if args.quick else 7)
    torch.set_num_threads(1)
    with scratch() as where, ExitStack() as stack:
        data, what = write_images(where / "tar", 2800)
        files = files_of(data, 10_000)
        write_forms(files, where)
        build_index(where / "mds", [where / "mds"])
        contenders = {
            "ours (indexed)": ours(data),
            "ours (mds)": ours(where / "mds"),
            "webdataset": plain_webdataset(data),
            "StreamingDataset": streaming_dataset(where / "mds"),
            "ImageFolder": image_folder(where / "folder"),
        }
        stack.callback(contenders.clear)
        print(
            f"{len(files)} {what} of {SIZE} px, {sum(map(len, files)) / len(files) / 1024:.1f} KiB each; batches of {BATCH}"
        )
        check_pixels(contenders, files)
        warm = 4
        count = min(len(files) // BATCH - warm - AHEAD, 16 if args.quick else 32)
        limit: list[float] = []
        rates: dict[tuple[str, int], list[float]] = {(n, w): [] for w in (1, 2) for n in contenders}
        cpus: dict[tuple[str, int], list[float]] = {key: [] for key in rates}
        order = list(rates)
        for number in range(rounds):
            for key in order[number % len(order) :] + order[: number % len(order)]:
                # The limit is taken right before and right after the figure that is held against it.
                before = decode_only(files[: count * BATCH // 2]) if key == ("ours (indexed)", 1) else None
                rate, cpu = measure(contenders[key[0]], key[1], count, warm)
                if before is not None:
                    limit.append((before + decode_only(files[: count * BATCH // 2])) / 2)
                rates[key].append(rate)
                cpus[key].append(cpu)
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
        rows: list[list[Any]] = [
            ["decode only, in memory", "-", f"{median(limit):.0f}", f"{1e6 / median(limit):.0f}", "1.00"]
        ]
        for (name, workers), found in rates.items():
            share = median(a / b for a, b in zip(found, limit))
            rows.append([name, workers, f"{median(found):.0f}", f"{median(cpus[name, workers]):.0f}", f"{share:.2f}"])

    def times(other: str, workers: int) -> float:
        return median(a / b for a, b in zip(rates["ours (indexed)", workers], rates[other, workers]))

    bars = [
        Bar("ours (indexed), 1 worker / decode only", median(a / b for a, b in zip(rates["ours (indexed)", 1], limit)),
            at_least=0.85, reason="the loader may cost 15% of a core beside decoding")
    ]  # fmt: skip
    for workers in (1, 2):
        bars += [
            Bar(f"ours (indexed) / {other}, {workers} workers", times(other, workers), at_least=bar)
            for other, bar in (("webdataset", 1.05), ("StreamingDataset", 1.05), ("ImageFolder", 1.4))
        ]
    header = ("loader", "workers", "images/s", "CPU us/image", "of the one-core limit")
    return finish(args, rows, header, bars, PACKAGES)


if __name__ == "__main__":
    sys.exit(main())
