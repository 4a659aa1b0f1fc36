"""How many images each stage of an evaluation takes at a time: what fits, and half of it once if memory runs out.

No image's result depends on the others in its batch, so a batch may be split wherever memory asks for it: to the same bits on
a CPU, and up to the rounding of other kernels on a GPU. A half that worked is noted beside the results, by device, so that the
next worker begins with it.
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

import torch
from pydantic import Field

from tarflow.errors import in_words
from tarflow.evaluation.errors import DeviceFailedError, EvaluationError
from tarflow.evaluation.log import Log
from tarflow.files import make_folder, read_bytes
from tarflow.models.cost import batch_that_fits
from tarflow.records import DamagedFileError, Record, load_record, save_record

NOTE = Path("evals", "batches.json")  # of a run
SAMPLING, DENOISING, LIKELIHOOD, FEATURES = "sampling", "denoising", "likelihood", "features"
# What to change when a stage does not fit even in half its batch.
_WAYS_OUT = {
    SAMPLING: "set sampling.batch_size={half} or lower",
    DENOISING: "set sampling.batch_size={half} or lower",
    LIKELIHOOD: "set sampling.batch_size={half} or lower",
    FEATURES: "choose a smaller network (evaluation.features), or evaluate with --device cpu",
}
# Failed allocations to which torch gives no type of their own: the CPU's, Apple's, and those inside cuBLAS.
_ALLOCATORS = ("DefaultCPUAllocator", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_ANY = 1 << 30  # images: no limit
ResultT = TypeVar("ResultT")


@dataclass
class Batches:
    """The batches of one process. `used`: stage -> images at a time, since somebody cleared it."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    log: Log = print
    used: dict[str, int] = field(default_factory=dict)
    note: Path | None = None  # where halves that worked are noted for later workers, see `Fitted`
    keep: bool = True  # whether this process notes its own there, too
    _most: dict[str, int] = field(default_factory=dict)
    _why: dict[str, str] = field(default_factory=dict)  # of a limit that has not been said yet
    _halved: set[str] = field(default_factory=set)

    def run(
        self, stage: str, count: int, compute: Callable[[slice], ResultT], bytes_per_image: float = 0.0
    ) -> list[ResultT]:
        """`compute` of consecutive parts of `count` images; a part's size goes by the stage's bytes, if they are given.

        Out of memory, all parts are computed again in half the size, and every later batch of the stage too. Raises
        EvaluationError if that does not fit either.
        """
        size = max(min(count, self._limit(stage, count, bytes_per_image)), 1)
        found, problem = self._try(count, size, compute)
        if found is None:
            size = self._half(stage, size, problem)
            found, problem = self._try(count, size, compute)
            if found is None:
                self._half(stage, size, problem)  # raises: it was halved before
                raise AssertionError(stage)
            self._note(stage, size)
        self.used[stage] = size if stage in self._halved else max(size, self.used.get(stage, 0))
        return found

    def _limit(self, stage: str, count: int, bytes_per_image: float) -> int:
        """The most images of a stage at a time; said once, when it is less than somebody asks for."""
        if stage not in self._most:
            self._most[stage] = _ANY
            free = free_bytes(self.device) if bytes_per_image else None
            if free is not None:
                self._most[stage] = batch_that_fits(free, bytes_per_image)
                self._why[stage] = (
                    f"by {bytes_per_image / 1e9:.2f} GB per image and {free / 1e9:.1f} GB free on {self.device}"
                )
            fitted = self._fitted().devices.get(device_name(self.device), {}).get(stage, _ANY)
            if fitted < self._most[stage]:
                self._most[stage] = fitted
                self._why[stage] = (
                    f"since more did not fit on {device_name(self.device)} before ({self.note} says so; remove it to try)"
                )
        most = self._most[stage]
        if most < count and stage in self._why:
            self.log(f"{stage}: {most} of {count} images at a time, {self._why.pop(stage)}")
        return most

    def _fitted(self) -> "Fitted":
        """What workers before this one noted; nothing where they did not, or where the note is damaged."""
        if self.note is not None:
            try:
                return load_record(self.note, Fitted)
            except FileNotFoundError:
                pass
            except (DamagedFileError, OSError) as error:
                self.log(f"{error}: not used")
        return Fitted()

    def _note(self, stage: str, size: int) -> None:
        """Note a half that worked. Two workers at once may lose one of two notes, which then is found out again."""
        if self.note is None or not self.keep:
            return
        devices, name = self._fitted().devices, device_name(self.device)
        devices[name] = {**devices.get(name, {}), stage: size}
        try:
            make_folder(self.note.parent.parent, self.note.parent.name)
            save_record(self.note, Fitted(devices=devices))
        except (OSError, ValueError) as error:
            self.log(f"{self.note} is not written ({in_words(error)}): the next worker will find out again what fits")

    def _try(self, count: int, size: int, compute: Callable[[slice], ResultT]) -> tuple[list[ResultT] | None, str]:
        """The parts, or None and what the allocator said. Nothing keeps the failed tensors alive: the error is gone."""
        try:
            return [compute(slice(at, min(at + size, count))) for at in range(0, count, size)], ""
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None, first_line(error)

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


class Fitted(Record):
    """`evals/batches.json`: what stages took at a time after a larger batch had not fitted."""

    what: ClassVar[str] = "which batches fitted"
    way_out: ClassVar[str] = "remove it, and larger batches are tried again"

    devices: dict[
        Annotated[str, Field(max_length=300)],
        dict[Annotated[str, Field(max_length=100)], Annotated[int, Field(gt=0, le=1 << 30)]],
    ] = Field(default_factory=dict)  # name of a device -> stage -> images at a time


def device_name(device: torch.device) -> str:
    """By which like devices are recognized: a GPU's name as its driver gives it, a CPU's host."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the {device.type} of {platform.node()}"


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
