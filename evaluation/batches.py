"""How many images each stage of an evaluation takes at a time: what fits, and half of it once if memory runs out.

No image's result depends on the others in its batch, so a batch may be split wherever memory asks for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from tarflow.evaluation.errors import DeviceFailedError, EvaluationError
from tarflow.evaluation.log import Log
from tarflow.files import read_bytes

SAMPLING, DENOISING, LIKELIHOOD, FEATURES = "sampling", "denoising", "likelihood", "features"
# What to change when a stage does not fit even in half its batch.
_WAYS_OUT = {
    SAMPLING: "set sampling.batch_size={half} or lower",
    DENOISING: "set sampling.batch_size={half} or lower",
    LIKELIHOOD: "set sampling.batch_size={half} or lower",
    FEATURES: "choose a smaller network (evaluation.features), or evaluate with --device cpu",
}
SHARE = 0.8  # of the free memory: allocators round up, and kernels need scratch space
# Failed allocations to which torch gives no type of their own: the CPU's, Apple's, and those inside cuBLAS.
_ALLOCATORS = ("DefaultCPUAllocator", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
ResultT = TypeVar("ResultT")


@dataclass
class Batches:
    """The batches of one process. `used`: stage -> images at a time, which a result records."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    log: Log = print
    used: dict[str, int] = field(default_factory=dict)
    _most: dict[str, int] = field(default_factory=dict)
    _halved: set[str] = field(default_factory=set)

    def run(
        self, stage: str, count: int, compute: Callable[[slice], ResultT], bytes_per_image: float = 0.0
    ) -> list[ResultT]:
        """`compute` of consecutive parts of `count` images; a part's size goes by the stage's bytes, if they are given.

        Out of memory, all parts are computed again in half the size, and every later batch of the stage too. Raises
        EvaluationError if that does not fit either.
        """
        if bytes_per_image and stage not in self._most:
            self._most[stage] = self._fitting(stage, count, bytes_per_image)
        size = max(min(count, self._most.get(stage, count)), 1)
        found, problem = self._try(count, size, compute)
        if found is None:
            size = self._half(stage, size, problem)
            found, problem = self._try(count, size, compute)
        if found is None:
            self._half(stage, size, problem)  # raises: it was halved before
            raise AssertionError(stage)
        self.used[stage] = size if stage in self._halved else max(size, self.used.get(stage, 0))
        return found

    def _try(self, count: int, size: int, compute: Callable[[slice], ResultT]) -> tuple[list[ResultT] | None, str]:
        """The parts, or None and what the allocator said. Nothing keeps the failed tensors alive: the error is gone."""
        try:
            return [compute(slice(at, min(at + size, count))) for at in range(0, count, size)], ""
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None, first_line(error)

    def _fitting(self, stage: str, count: int, bytes_per_image: float) -> int:
        free = free_bytes(self.device)
        if free is None:
            return count
        # A power of two: two devices that differ a little in what is free take the same batch.
        most = 1 << max(int(SHARE * free / bytes_per_image), 1).bit_length() - 1
        if most < count:
            self.log(
                f"{stage}: {most} of {count} images at a time, by {bytes_per_image / 1e9:.2f} GB per image and "
                f"{free / 1e9:.1f} GB free on {self.device}"
            )
        return most

    def _half(self, stage: str, size: int, problem: str) -> int:
        where = f"{stage} of {size} images at a time does not fit into the memory of {self.device}"
        half = size // 2
        if stage in self._halved or not half:
            way_out = _WAYS_OUT[stage] if half or stage == FEATURES else "evaluate on a device with more memory"
            raise EvaluationError(
                f"{where}{', after its batch was halved once' if stage in self._halved else ''}: "
                f"{way_out.format(half=half)} ({problem})"
            )
        self.log(f"{where}: halved once, to {half}, from here on ({problem})")
        self._halved.add(stage)
        self._most[stage] = half
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return half


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _ALLOCATORS)


def first_line(error: BaseException) -> str:
    """What an error of torch says, without the advice and the stacks below it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def free_bytes(device: torch.device) -> float | None:
    """Bytes that this process can still allocate on a device; None where nobody tells."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return _free_on_host() if device.type == "cpu" else None


def _free_on_host() -> float | None:
    """What the kernel can still give out, under the limit of the process's control group if it has one."""
    lines = _text(Path("/proc/meminfo")).splitlines()
    found = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    group = _text(Path("/proc/self/cgroup")).strip().rpartition("::")[2].lstrip("/")
    folder = Path("/sys/fs/cgroup") / group
    limit, used = (_text(folder / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and used.isdecimal():
        found.append(float(max(int(limit) - int(used), 0)))
    return min(found) if found else None


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except OSError:
        return ""


@contextmanager
def named_cause(what: str, device: torch.device) -> Iterator[None]:
    """Turn an error of torch into one that says what was computed, and where.

    Raises EvaluationError, or DeviceFailedError where the device itself failed: nothing later can be computed on it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.AcceleratorError):
            raise DeviceFailedError(
                f"{what}: the device {device} failed ({first_line(error)}): start the worker again, on another device if "
                "this comes again"
            ) from error
        if is_out_of_memory(error):
            raise EvaluationError(
                f"{what}: out of memory on {device} ({first_line(error)}): free the device, choose one with more memory, or "
                "lower sampling.batch_size"
            ) from error
        raise EvaluationError(f"{what}: {type(error).__name__} on {device}: {first_line(error)}") from error
