"""The parent's side of the worker processes: unnamed shared memory, one task queue, results by batch.

The memory is an anonymous file (`memfd`) that disappears with the last process that holds it: nothing can be left in
/dev/shm. All workers receive from one socket, so a chunk goes to the next free worker and a slow shard delays no other.
A batch's images are handed out as views of its slot; the slot is reused when the last view of it is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import select
import socket
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.sample_reader import Skipped
from tarflow.data_pipeline.loading.worker import Layout, Spec
from tarflow.interpreter import child_environment, deaf_to_terminals, module_command

_KIND = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM
_MAX_CHUNK = 64
_HELD = 2  # batches that the consumer may hold without a copy: the one in use and the one before


Ready = Callable[[], None]


class WorkerPool:
    """`num_workers` processes that fill batches of `layout.rows` samples, at most `prefetch` ahead of the consumer."""

    def __init__(self, spec: Spec, layout: Layout, num_workers: int, prefetch: int) -> None:
        self.layout = layout
        self.prefetch = prefetch
        slots = prefetch + _HELD
        self.memory_bytes = slots * layout.slot_bytes
        fd = _anonymous_file(self.memory_bytes)
        self.memory = mmap.mmap(fd, self.memory_bytes)
        # Each slot with what must be waited for before it is overwritten, e.g. a copy to the GPU.
        self.free: deque[tuple[int, Ready | None]] = deque((slot, None) for slot in range(slots))
        self.held: set[int] = set()
        self.chunk = min(_MAX_CHUNK, -(-layout.rows // num_workers))
        self._missing: dict[int, int] = {}  # slot -> rows still missing
        self._skipped: dict[int, list[Skipped]] = {}
        self._failed: dict[int, Exception] = {}
        self._unsent: deque[bytes] = deque()
        tasks, workers_end = socket.socketpair(socket.AF_UNIX, _KIND)
        tasks.setblocking(False)
        self._tasks = tasks
        self._results: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        config = {
            "spec": asdict(spec), "layout": asdict(layout), "memory": fd, "memory_bytes": self.memory_bytes,
            "tasks": workers_end.fileno(), "parent": os.getpid(),
        }  # fmt: skip
        try:
            for _ in range(num_workers):
                mine, theirs = socket.socketpair(socket.AF_UNIX, _KIND)
                self._results.append(mine)
                with theirs:
                    self._processes.append(_start(config | {"results": theirs.fileno()}))
        finally:
            workers_end.close()
            os.close(fd)
        self._poller = select.poll()
        for results in self._results:
            self._poller.register(results, select.POLLIN)
            results.setblocking(False)
        # Runs too when the loader is just dropped, or the interpreter exits.
        self._finalizer = weakref.finalize(self, _stop, self._tasks, self._results, self._processes)

    def can_submit(self) -> bool:
        """Whether another batch can be started: a slot is free and fewer than `prefetch` batches are in progress or ready."""
        return bool(self.free) and len(self._missing) < self.prefetch

    def submit(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> int:
        """Start a batch (int64 [rows] each); returns its slot."""
        # The slot freed last is still in the CPU's caches. But if its copy to the GPU may be running, take the one freed first.
        slot, ready = self.free.pop() if self.free[-1][1] is None else self.free.popleft()
        if ready is not None:
            ready()
        self._missing[slot] = len(ids)
        self._skipped[slot] = []
        for first in range(0, len(ids), self.chunk):
            part = slice(first, first + self.chunk)
            head = np.array([slot, first, len(ids[part])], dtype=np.int64)
            self._unsent.append(np.concatenate([head, ids[part], positions[part]]).tobytes())
        self._send()
        return slot

    def wait(self, slot: int) -> list[Skipped]:
        """Block until the batch in `slot` is complete; returns the samples replaced in it. Raises what its workers raised."""
        while self._missing[slot] and slot not in self._failed:
            self._receive()
        if slot in self._failed:
            raise self._failed[slot]
        del self._missing[slot]
        return self._skipped.pop(slot)

    def take(self, slot: int, on_free: Callable[[], Ready | None]) -> NDArray[np.uint8]:
        """The images of a complete batch, uint8 [rows, H, W, C]: a view of the slot, or a copy when too many slots are held.

        `on_free()` is called when the last view is gone; what it returns is called before the slot is overwritten.
        """
        shape = (self.layout.rows, *self.layout.pixels)
        size = int(np.prod(shape))
        if len(self.held) >= _HELD:
            copy = self.layout.views(self.memory, slot)[0].copy()
            self.free.append((slot, None))
            return copy
        self.held.add(slot)
        # Views of views drop the arrays in between, but always keep the base object: its end is the end of the last view.
        bottom = (ctypes.c_ubyte * size).from_buffer(self.memory, slot * self.layout.slot_bytes)
        watch = weakref.finalize(bottom, _give_back, weakref.ref(self), slot, on_free)
        watch.atexit = False
        return np.frombuffer(bottom, dtype=np.uint8).reshape(shape)  # type: ignore[call-overload]

    def labels_and_ids(self, slot: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Copies of the labels and delivered ids of a complete batch, int64 [rows] each."""
        _, labels, ids = self.layout.views(self.memory, slot)
        return labels.copy(), ids.copy()

    def address(self) -> int:
        """Where the shared memory is mapped in this process."""
        return ctypes.addressof(ctypes.c_ubyte.from_buffer(self.memory))

    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """Stop the workers and wait for them; batches that were handed out stay valid."""
        self._finalizer()

    def _send(self) -> None:
        while self._unsent:
            try:
                self._tasks.send(self._unsent[0])
            except BlockingIOError:
                return
            except OSError:
                return  # all workers are gone: `_receive` reports which and why
            self._unsent.popleft()

    def _receive(self) -> None:
        self._send()
        by_fd = {results.fileno(): number for number, results in enumerate(self._results)}
        for fd, _ in self._poller.poll(100 if self._unsent else 1000):
            number = by_fd[fd]
            try:
                message = self._results[number].recv(1 << 20)
            except BlockingIOError:
                continue
            except ConnectionError:
                message = b""
            if not message:
                raise DataError(_how_it_ended(number, self._processes[number]))
            reply = json.loads(message)
            slot = reply["slot"]
            if "error" in reply:
                self._failed[slot] = DataError(reply["error"])
            elif "crash" in reply:
                self._failed[slot] = RuntimeError(f"a data worker failed:\n{reply['crash']}")
            else:
                self._missing[slot] -= reply["rows"]
                self._skipped[slot] += [Skipped(**bad) for bad in reply["skipped"]]
        if sys.platform != "linux":
            for number, process in enumerate(self._processes):
                if process.poll() is not None:
                    raise DataError(_how_it_ended(number, process))


def _give_back(pool_reference: weakref.ref[WorkerPool], slot: int, on_free: Callable[[], Ready | None]) -> None:
    pool = pool_reference()
    if pool is not None:
        pool.held.discard(slot)
        pool.free.append((slot, on_free()))


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tarflow-batches")
    else:
        with tempfile.TemporaryFile() as file:  # unlinked at once
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def _start(config: dict[str, object]) -> subprocess.Popen[bytes]:
    # Only these three descriptors are inherited; the workers import the package from where this process did.
    inherited = [int(str(config[name])) for name in ("memory", "tasks", "results")]
    with deaf_to_terminals():
        return subprocess.Popen(  # noqa: S603 -- this package, by its own interpreter
            module_command("tarflow.data_pipeline.loading.worker", json.dumps(config)),
            pass_fds=inherited, stdin=subprocess.DEVNULL, env=child_environment(OMP_NUM_THREADS="1"),
        )  # fmt: skip


def _how_it_ended(number: int, process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    code = process.returncode
    how = "closed its connection" if code is None else f"ended with exit code {code}"
    if code is not None and code < 0:
        how = f"was killed by signal {-code}" + (" (often: out of memory)" if code == -9 else "")
    return f"data worker {number} (process {process.pid}) {how}; fewer workers (data.num_workers) need less memory"


def _stop(tasks: socket.socket, results: list[socket.socket], processes: list[subprocess.Popen[bytes]]) -> None:
    tasks.close()
    for connection in results:
        connection.close()
    for process in processes:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:  # stuck in a read that never returns
            process.kill()
            process.wait()
