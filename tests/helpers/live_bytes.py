"""Counts the bytes of tensors while they are computed: with fake tensors of any size, on a machine of any size."""

import multiprocessing
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import TarFlow


class LiveBytes(TorchDispatchMode):
    """`now` and `peak`: bytes of all storages that operations made while the mode is on. Kernels' scratch space is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # made before: not counted, whichever views of it are made
            self._see(tensor, counted=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._see(tensor, counted=True)
        self.peak = max(self.peak, self.now)
        return out

    def _see(self, tensor: Any, counted: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or (storage := tensor.untyped_storage())._cdata in self._known:
            return
        key, size = storage._cdata, storage.nbytes() if counted else 0
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(make: Callable[[], Callable[[], Any]]) -> int:
    """Peak of the bytes that `make()()` allocates, on fake tensors; what `make` itself makes does not count.

    In a fork: a backward pass on fake tensors starts threads of autograd, after which no fork of a process can take one.
    """
    forks = multiprocessing.get_context("fork")
    answers, sends = forks.Pipe(duplex=False)

    def measure() -> None:
        with FakeTensorMode():
            run = make()
            with LiveBytes() as live:
                run()
        sends.send(live.peak)

    process = forks.Process(target=measure)
    process.start()
    sends.close()
    peak = int(answers.recv())
    process.join()
    return peak


def per_image(config: TarFlowConfig, compute: Callable[..., Any]) -> float:
    """Counted on fake tensors: the difference of two batches, so that what does not grow with the batch falls out."""

    def peak(count: int) -> int:
        def prepared() -> Callable[[], Any]:
            model = TarFlow(config).eval().requires_grad_(False)
            images = torch.zeros(count, *config.image_shape)
            return lambda: compute(model, images, torch.zeros(count, dtype=torch.int64))

        return peak_bytes(prepared)

    return (peak(5) - peak(2)) / 3
