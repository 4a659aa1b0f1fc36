"""Files of weights that a user supplies: read safely, known by their hash, refused with what does not fit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tarflow.evaluation.errors import EvaluationError


def sha256_of(path: Path) -> str:
    """Of the file's bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file or a PyTorch file; nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # an unpickler fails on rubbish in every way there is
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EvaluationError(f"{path} is no file of weights that can be read safely ({first})") from None
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise EvaluationError(f"{path} does not hold tensors by name (a state dict)")
    return dict(stored)


def fill(network: nn.Module, tensors: Mapping[str, Tensor], origin: str, beside: tuple[str, ...] = ()) -> None:
    """Put tensors into a network: all of them, with the shapes they must have. `beside`: prefixes that may be there too."""
    wanted = network.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(beside or ("\0",))}
    # Counters of batch norms are not in every file and mean nothing here.
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing, extra = wanted.keys() - given.keys() - optional, given.keys() - wanted.keys()
    shapes = [name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape]
    if missing or extra or shapes:
        what = "; ".join(
            f"{title}: {', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''}"
            for title, names in (("missing", missing), ("unknown", extra), ("of another shape", shapes))
            if names
        )
        raise EvaluationError(f"{origin} does not hold the weights of this feature network ({what})")
    network.load_state_dict(given, strict=False)
