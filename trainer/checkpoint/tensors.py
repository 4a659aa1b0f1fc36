"""The tensors in a checkpoint's directory: torch's distributed checkpoint, written sharded, read at any world size."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tarflow.trainer.checkpoint.commit import Checkpoint
from tarflow.trainer.errors import TrainerError


def write_tensors(path: Path, tensors: dict[str, Any], group: Any = None) -> None:
    """Write tensors, sharded or not, into a directory; making the files durable is the caller's. Every rank calls it."""
    import torch.distributed.checkpoint as dcp

    with _quiet():
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(path, sync_files=False), process_group=group)


def read_tensors(checkpoint: Checkpoint, into: dict[str, Any]) -> None:
    """Fill tensors in place from a checkpoint, whatever world size wrote it. Names and shapes must agree exactly."""
    import torch.distributed.checkpoint as dcp

    _check_names_and_shapes(checkpoint, {name: tuple(t.shape) for name, t in into.items()}, exact=True)
    with _quiet(), _plain_errors():
        dcp.load(dict(into), storage_reader=dcp.FileSystemReader(checkpoint.path))


def stored_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint."""
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in metadata.items() if hasattr(entry, "size")}


def load_weights(checkpoint: Checkpoint, which: str) -> dict[str, Any]:
    """One set of weights, "raw" or an average such as "ema-0.050": name -> float32 tensor on the CPU.

    A set that the checkpoint does not hold is an error that lists those it does (case T06).
    """
    import torch
    import torch.distributed.checkpoint as dcp

    prefix = "model" if which == "raw" else which
    shapes = stored_shapes(checkpoint)
    wanted = {n: shape for n, shape in shapes.items() if n.startswith(f"{prefix}/") or n == "buffer/var"}
    have = sorted(s for s in {n.split("/")[0] for n in shapes} if s == "model" or s.startswith("ema-"))
    if prefix not in have:
        raise TrainerError(
            f"checkpoint {checkpoint.path} holds no weights {which!r}; it holds: "
            + ", ".join("raw" if n == "model" else n for n in have)
        )
    tensors = {name: torch.empty(shape) for name, shape in wanted.items()}
    with _quiet(), _plain_errors():
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint.path), no_dist=True)
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items()}


def _check_names_and_shapes(checkpoint: Checkpoint, ours: dict[str, tuple[int, ...]], exact: bool) -> None:
    theirs = stored_shapes(checkpoint)
    problems = [f"missing in the checkpoint: {n}" for n in ours if n not in theirs]
    problems += [f"not in this model: {n}" for n in theirs if n not in ours and exact]
    problems += [
        f"{n}: {list(theirs[n])} in the checkpoint, {list(ours[n])} here"
        for n in ours
        if n in theirs and theirs[n] != ours[n]
    ]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise TrainerError(f"checkpoint {checkpoint.path} does not fit this configuration:\n  {shown}")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a rank met, instead of torch's collection of it, which is no Exception and holds even a Ctrl-C."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the note that a single process saves without a process group: it is meant."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(torch.distributed is|TypedStorage).*")
        yield
