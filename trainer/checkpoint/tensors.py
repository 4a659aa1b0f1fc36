"""The tensors of a checkpoint: torch's distributed checkpoint (DCP), written sharded, read at any world size.

torch's own reader unpickles `.metadata`, and values that are not tensors, without any check. Here the metadata come from
`metadata.py`, and a value that is not a tensor is refused: our checkpoints have none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tarflow.errors import UserError
from tarflow.records import DamagedFileError
from tarflow.trainer.checkpoint.marker import WAY_OUT, Checkpoint, require_whole
from tarflow.trainer.checkpoint.metadata import StoredTensor, read_metadata
from tarflow.trainer.errors import TrainerError


def write_tensors(path: Path, tensors: dict[str, Any], group: Any = None) -> None:
    """Write tensors, sharded or not, into a directory. Every rank calls it; syncing the files is left to the caller."""
    import torch.distributed.checkpoint as dcp

    with _quiet():
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(path, sync_files=False), process_group=group)


def read_tensors(checkpoint: Checkpoint, into: dict[str, Any]) -> None:
    """Fill tensors in place from a checkpoint, whatever world size wrote it. Names and shapes must agree exactly.

    Does not verify checksums: `newest_intact`, which chose the checkpoint, has done so.
    """
    stored = _stored(checkpoint)
    _check_names_and_shapes(checkpoint, stored, {name: tuple(t.shape) for name, t in into.items()})
    _load(checkpoint, stored, dict(into))


def stored_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint. Raises DamagedFileError."""
    return {name: tensor.shape for name, tensor in _stored(checkpoint).items()}


def load_weights(checkpoint: Checkpoint, which: str) -> dict[str, Any]:
    """One set of weights, "raw" or an average such as "ema-0.050": name -> float32 tensor on the CPU.

    Of a set that the checkpoint does not hold, the error lists those that it does. The first call verifies the checksums
    of all files; raises DamagedFileError where one differs.
    """
    import torch

    require_whole(checkpoint)
    prefix = "model" if which == "raw" else which
    stored = _stored(checkpoint)
    # The prior's variance is a buffer, not averaged: it belongs to every set.
    wanted = {n: tensor for n, tensor in stored.items() if n.startswith(f"{prefix}/") or n == "buffer/var"}
    have = sorted(s for s in {n.split("/")[0] for n in stored} if s == "model" or s.startswith("ema-"))
    if prefix not in have:
        raise TrainerError(
            f"checkpoint {checkpoint.path} holds no weights {which!r}; it holds: "
            + ", ".join("raw" if n == "model" else n for n in have)
        )
    tensors = {name: torch.empty(tensor.shape) for name, tensor in wanted.items()}
    _load(checkpoint, wanted, tensors, no_dist=True)
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items()}


def _stored(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    return read_metadata(checkpoint.path, checkpoint.sizes)


def _load(checkpoint: Checkpoint, stored: dict[str, StoredTensor], into: dict[str, Any], no_dist: bool = False) -> None:
    """Let torch read tensors, but with metadata that were checked."""
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return _for_torch(stored)

    class Planner(dcp.DefaultLoadPlanner):
        def load_bytes(self, *_: Any) -> None:
            raise ValueError("a value that is not a tensor")  # torch would unpickle it

    with _quiet(), _plain_errors(checkpoint):
        dcp.load(into, storage_reader=Reader(checkpoint.path), planner=Planner(), no_dist=no_dist)


def _for_torch(stored: dict[str, StoredTensor]) -> Any:
    """The metadata in torch's own classes."""
    import torch
    import torch.distributed.checkpoint.metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensors: dict[str, Any] = {}
    places = {}
    for name, tensor in stored.items():
        chunks = [dcp.ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in tensor.pieces]
        properties = dcp.TensorProperties(dtype=getattr(torch, tensor.dtype))
        tensors[name] = dcp.TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for number, piece in enumerate(tensor.pieces):
            index = dcp.MetadataIndex(name, piece.offsets, number)
            places[index] = _StorageInfo(piece.file, piece.start, piece.length)
    return dcp.Metadata(tensors, storage_data=places, storage_meta=dcp.StorageMeta())


def _check_names_and_shapes(
    checkpoint: Checkpoint, stored: dict[str, StoredTensor], ours: dict[str, tuple[int, ...]]
) -> None:
    theirs = {name: tensor.shape for name, tensor in stored.items()}
    problems = [f"missing in the checkpoint: {n}" for n in ours if n not in theirs]
    problems += [f"not in this model: {n}" for n in theirs if n not in ours]
    problems += [
        f"{n}: {list(theirs[n])} in the checkpoint, {list(ours[n])} here"
        for n in ours
        if n in theirs and theirs[n] != ours[n]
    ]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise TrainerError(f"checkpoint {checkpoint.path} does not fit this configuration:\n  {shown}")


@contextmanager
def _plain_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise what a rank met instead of torch's collection, which is not an Exception and may hold even a Ctrl-C."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, OSError | UserError | MemoryError) or not isinstance(first, Exception):
            raise first from None
        reason = f"its tensors cannot be read ({type(first).__name__}: {first!s:.200})".splitlines()[0]
        raise DamagedFileError(checkpoint.path, reason, WAY_OUT) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning that a single process saves without a process group: it is intended."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(torch.distributed is|TypedStorage).*")
        yield
