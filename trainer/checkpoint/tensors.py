"""The tensors of a checkpoint: torch's distributed checkpoint (DCP), written sharded, read at any world size.

torch's own reader unpickles `.metadata`, and values that are not tensors, without any check. Here the metadata come from
`metadata.py`, and a value that is not a tensor is refused: our checkpoints have none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarflow.errors import UserError
from tarflow.records import DamagedFileError
from tarflow.trainer.checkpoint.marker import WAY_OUT, Checkpoint, require_file
from tarflow.trainer.checkpoint.metadata import NAME as METADATA
from tarflow.trainer.checkpoint.metadata import StoredTensor, read_metadata
from tarflow.trainer.errors import TrainerError

if TYPE_CHECKING:
    from tarflow.trainer.checkpoint.layout import Layout


def write_tensors(path: Path, tensors: dict[str, Any], group: Any = None, layout: "Layout | None" = None) -> None:
    """Write tensors, sharded or not, into a directory. Every rank calls it; syncing the files is left to the caller.

    `layout`: of the saves of one run, kept by the caller, so that only the first one is planned.
    """
    from tarflow.trainer.checkpoint.layout import Layout

    with _quiet():
        (layout or Layout()).save(path, tensors, group)


def read_tensors(checkpoint: Checkpoint, into: dict[str, Any]) -> None:
    """Fill tensors in place from a checkpoint, whatever world size wrote it. Names and shapes must agree exactly.

    Every rank calls it and reads what it holds, on its own; the first failure is raised on all of them. The bytes that are
    read are held against the checksums beside them; those of whole files were checked by `newest_intact`.
    """
    from tarflow.trainer.parallel.world import gather

    problem: Exception | None = None
    try:
        stored = _stored(checkpoint)
        _check_names_and_shapes(checkpoint, stored, {name: tuple(t.shape) for name, t in into.items()})
        _load(checkpoint, stored, into, trusted=True)
    except (OSError, UserError, MemoryError) as error:
        problem = error
    first = next((found for found in gather(problem) if found is not None), None)
    if first is not None:
        raise first


def stored_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a checkpoint. Raises DamagedFileError."""
    return {name: tensor.shape for name, tensor in _stored(checkpoint).items()}


def load_weights(checkpoint: Checkpoint, which: str) -> dict[str, Any]:
    """One set of weights, "raw" or an average such as "ema-0.050": name -> float32 tensor on the CPU.

    Of a set that the checkpoint does not hold, the error lists those that it does. Reads the bytes of this set and no
    others, each against its checksum; raises DamagedFileError where one differs.
    """
    import torch

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
    _load(checkpoint, wanted, tensors, trusted=False)
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items()}


def _stored(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    require_file(checkpoint, METADATA)
    return read_metadata(checkpoint.path, checkpoint.sizes)


def _load(checkpoint: Checkpoint, stored: dict[str, StoredTensor], into: dict[str, Any], trusted: bool) -> None:
    """Let torch read tensors, but with metadata that were checked, and from bytes that are."""
    import torch.distributed.checkpoint as dcp

    from tarflow.trainer.checkpoint.pieces import PieceReader, PieceSums

    reader = PieceReader(checkpoint.path, _for_torch(stored), PieceSums(checkpoint, trusted))
    with _quiet(), _plain_errors(checkpoint):
        # Each rank by itself: DCP would send all that each of them wants through rank 0.
        dcp.load(into, storage_reader=reader, no_dist=True)


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
