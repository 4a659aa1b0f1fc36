"""A loader's worker process: takes chunks of a batch, decodes them straight into shared memory, reports back.

Started by `worker_pool` as a fresh interpreter (`python -m tarflow.data_pipeline.loading.worker`), never by fork: no locks,
CUDA state or random streams are inherited, and torch is not loaded. It communicates over two sockets and ends when the parent's
ends are closed, so it cannot outlive the parent however that ends. Signals meant for the training process are ignored.

Task message: int64 [3 + 2n] = slot, first row, n, then n sample ids and n stream positions.
Result message: JSON; the pixels, labels and delivered ids lie in the slot.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # before the imports below, which take a while
    for _number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(_number, signal.SIG_IGN)

import gc
import json
import math
import mmap
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.bounds import MAX_PIXELS
from tarflow.data_pipeline.images.crop import Crop
from tarflow.data_pipeline.images.transform import flips
from tarflow.data_pipeline.loading.custom.code import Named
from tarflow.data_pipeline.loading.custom.dataset import CustomDataset, open_dataset
from tarflow.data_pipeline.loading.custom.reader import CustomReader
from tarflow.data_pipeline.loading.custom.transform import Transform
from tarflow.data_pipeline.loading.sample_reader import Reader, SampleReader, Skipped, SkippingReader
from tarflow.data_pipeline.loading.shape import ImageShape
from tarflow.data_pipeline.storage.access import Access
from tarflow.data_pipeline.storage.open_index import open_index
from tarflow.data_pipeline.storage.remote_shards import open_shards

MAX_MESSAGE = 1 << 17


@dataclass(frozen=True)
class Spec:
    """What a worker, or the thread that takes its place, must know to produce samples."""

    data: str
    fingerprint: str
    shape: ImageShape
    on_error: str
    seed: int
    flip: bool
    access: Access
    max_pixels: int = MAX_PIXELS
    dataset: Named | None = None  # gives the samples, in the place of shards
    transform: Named | None = None
    crop: str = "centre"

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Spec:
        """From the output of `asdict`."""
        access = plain["access"] | {"allow_roots": tuple(plain["access"]["allow_roots"])}
        parts: dict[str, Any] = {"shape": ImageShape(**plain["shape"]), "access": Access(**access)}
        parts |= {key: Named(**plain[key]) for key in ("dataset", "transform") if plain[key] is not None}
        return cls(**plain | parts)


@dataclass(frozen=True)
class Layout:
    """Where the parts of a batch of `rows` samples lie in a slot: pixels, then labels, then ids."""

    rows: int
    pixels: tuple[int, int, int]  # H, W, C

    @property
    def pixel_bytes(self) -> int:
        """Bytes of all images, rounded up so that the integers after them are aligned."""
        return -(-self.rows * math.prod(self.pixels) // 64) * 64

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, a whole number of pages."""
        return -(-(self.pixel_bytes + 16 * self.rows) // mmap.PAGESIZE) * mmap.PAGESIZE

    def views(self, memory: object, slot: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
        """(images uint8 [rows, H, W, C], labels int64 [rows], ids int64 [rows]) of a slot, as views of `memory`."""
        start = slot * self.slot_bytes
        shape = (self.rows, *self.pixels)
        images = np.frombuffer(memory, np.uint8, math.prod(shape), start).reshape(shape)  # type: ignore[call-overload]
        integers = np.frombuffer(memory, np.int64, 2 * self.rows, start + self.pixel_bytes)  # type: ignore[call-overload]
        return images, integers[: self.rows], integers[self.rows :]


class Producer:
    """Fills rows of a batch from sample ids. The same code runs in workers and in the loader's own thread."""

    def __init__(self, spec: Spec, custom: CustomDataset | None = None) -> None:
        self.spec = spec
        transform = Transform(spec.transform, spec.seed, spec.max_pixels) if spec.transform else None
        crop = Crop(spec.crop, spec.seed)
        reader = _custom(spec, custom, transform, crop) if spec.dataset else _indexed(spec, transform, crop)
        self.num_samples = reader.num_samples
        self.reader = SkippingReader(reader, spec.on_error)

    def fill(
        self,
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        delivered: NDArray[np.int64],
    ) -> list[Skipped]:
        """Write the samples `ids` (int64 [n]) into images [n, H, W, C], labels [n] and delivered ids [n].

        `positions` (int64 [n]) key the flips and tell the epoch. Returns the samples that were replaced; raises DataError in
        strict mode.
        """
        skipped: list[Skipped] = []
        mirrored: Sequence[bool] = flips(self.spec.seed, positions).tolist() if self.spec.flip else [False] * len(ids)
        for row, (sample, position) in enumerate(zip(ids.tolist(), positions.tolist())):
            image, epoch = images[row], position // self.num_samples
            labels[row], delivered[row], bad = self.reader.read_into(sample, image, epoch)
            if mirrored[row]:
                image[...] = image[:, ::-1].copy()
            if bad is not None:
                skipped.append(bad)
        return skipped


def _indexed(spec: Spec, transform: Transform | None, crop: Crop) -> Reader:
    index = open_index(spec.data, spec.access)
    if index.fingerprint != spec.fingerprint:
        raise DataError(f"the index at {spec.data} was rewritten while the loader was starting: start again")
    return SampleReader(index, spec.shape, open_shards(index, spec.access), spec.max_pixels, transform, crop)


def _custom(spec: Spec, custom: CustomDataset | None, transform: Transform | None, crop: Crop) -> Reader:
    """`custom`: the data set that is open already in this process, if there is one."""
    assert spec.dataset is not None
    data = custom or open_dataset(spec.dataset, spec.data)
    if data.fingerprint != spec.fingerprint:
        raise DataError(
            f"{data.function}: called with {spec.data!r} again, in another process, it gives other images or another order "
            f"(fingerprint {spec.fingerprint} there, {data.fingerprint} here): sort what is listed from a folder or a set"
        )
    return CustomReader(data, spec.shape, spec.max_pixels, transform, crop)


def main(arguments: list[str]) -> None:
    """Serve tasks until the parent closes its end of the socket."""
    config = json.loads(arguments[0])
    layout = Layout(**config["layout"])
    tasks = socket.socket(fileno=config["tasks"])
    results = socket.socket(fileno=config["results"])
    # Map all pages at once: a page fault for each while decoding would cost more.
    memory = mmap.mmap(config["memory"], config["memory_bytes"], mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    gc.freeze()  # what was imported stays, so the collector need not scan it
    parent = config["parent"]
    tasks.settimeout(5.0)
    producer: Producer | None = None
    while True:
        try:
            message = tasks.recv(MAX_MESSAGE)
        except TimeoutError:
            if os.getppid() != parent:  # for systems whose sockets do not report the other end's death
                return
            continue
        if not message:
            return
        numbers = np.frombuffer(message, dtype=np.int64)
        slot, first, n = numbers[:3].tolist()
        reply: dict[str, object] = {"slot": slot, "rows": n}
        try:
            producer = producer or Producer(Spec.from_json(config["spec"]))
            rows = slice(first, first + n)
            images, labels, delivered = layout.views(memory, slot)
            skipped = producer.fill(numbers[3 : 3 + n], numbers[3 + n :], images[rows], labels[rows], delivered[rows])
            reply["skipped"] = [asdict(bad) | {"message": bad.message[:500]} for bad in skipped]
        except DataError as err:
            reply["error"] = str(err)[:4000]
        except Exception:  # noqa: BLE001 - the loader raises it again, with this text
            reply["crash"] = traceback.format_exc()[-8000:]
        try:
            results.send(json.dumps(reply).encode())
        except OSError:  # the parent is gone
            return


if __name__ == "__main__":
    main(sys.argv[1:])
