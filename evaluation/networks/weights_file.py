"""Files of weights that a user supplies: read safely, identified by their hash, refused where they do not match."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from tarflow.evaluation.errors import EvaluationError
from tarflow.files import open_to_read
from tarflow.models.formats.tensor_files import read_pickled, read_safetensors


def sha256_of(path: Path) -> str:
    """Of the file's bytes, hex."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors or PyTorch file; nothing in it is executed. Raises what the formats' readers raise."""
    return (read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)).tensors


def fill(network: nn.Module, tensors: Mapping[str, Tensor], origin: str, beside: tuple[str, ...] = ()) -> None:
    """Load tensors into a network: all of them, with matching shapes. `beside`: prefixes of further tensors to ignore.

    A network on the meta device takes the tensors themselves, in float32.
    """
    wanted = network.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(beside or ("\0",))}
    # Counters of batch norms are not in every file and are not used here.
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing, extra = wanted.keys() - given.keys() - optional, given.keys() - wanted.keys()
    shapes = [name for name in wanted.keys() & given.keys() if _kind(wanted[name]) != _kind(given[name])]
    if missing or extra or shapes:
        what = "; ".join(
            f"{title}: {', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''}"
            for title, names in (("missing", missing), ("unknown", extra), ("of another shape or type", shapes))
            if names
        )
        raise EvaluationError(f"{origin} does not hold the weights of this feature network ({what})")
    on_meta = any(tensor.is_meta for tensor in wanted.values())
    network.load_state_dict(
        {k: v.float() for k, v in given.items()} if on_meta else given, strict=False, assign=on_meta
    )


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], bool]:
    return tuple(tensor.shape), tensor.is_floating_point()
